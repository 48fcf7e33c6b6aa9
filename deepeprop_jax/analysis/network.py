"""The analysis of a network: of every node, in order, with the shapes of what flows between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable

import jax

from deepeprop_jax.analysis.labels import Labelling
from deepeprop_jax.analysis.node import AnalysedNetwork, Leaf, Node, Reach, Recurrence
from deepeprop_jax.analysis.transition import cut_cell
from deepeprop_jax.analysis.units import units_of
from deepeprop_jax.analysis.vjp import Found, vjp_program
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.program import Atom
from deepeprop_jax.jaxpr.real_leaves import RealView, shape_and_dtype
from deepeprop_jax.jaxpr.trace import check_custom_rules, context
from deepeprop_jax.network.cell import Graph, PyTree, Vertex, Wire, connect, parents, select


def analyse_network(
    graph: Graph, params: PyTree, carry: PyTree, x: PyTree, known: dict[Hashable, Node]
) -> AnalysedNetwork:
    """Analyse every node, or name the one that does not fit its params, carry or input in a ``ValueError``.

    Args:
      params, carry, x: shapes and dtypes, of one example where there is a batch axis.
      known: nodes that were analysed before, in any mode; takes those of this graph.
    """
    nodes: list[Node] = []
    outputs: dict[int, PyTree] = {}
    for index, vertex in enumerate(graph.nodes):
        u = _carried(vertex.name, vertex.wire, x, outputs)
        node_params, node_carry = (
            _layer_avals(vertex, what, select(tree, vertex.path))
            for what, tree in (("params", params), ("carry", carry))
        )
        outputs[index] = _check_cell(vertex, node_params, node_carry, u)
        arguments = (node_params, node_carry, u, outputs[index])
        avals = tuple(map(str, jax.tree.leaves(arguments)))
        # The external input has no derivative that anything asks for; what cannot be differentiated by it need not be.
        external = vertex.depth is None and not parents(vertex.wire)
        key = (vertex.cell.apply, jax.tree.structure(arguments), avals, external, context())
        if key not in known:
            known[key] = _analyse(vertex, *arguments, external)
        nodes.append(known[key]._replace(name=vertex.name))
    output_avals = _carried("outputs", graph.output, x, outputs)
    return AnalysedNetwork(graph, tuple(nodes), RealView(output_avals), output_avals)


_CLOSED_RULE = (
    "keeps a traced value where JAX cannot follow it, and jax.grad through a scan fails likewise. Does a custom_jvp or "
    "custom_vjp function read a parameter, the carry or the input by closure, or as one of nondiff_argnums? Make it an "
    "argument, and let the rule give its derivative too, which may be zero."
)


def _analyse(vertex: Vertex, params: PyTree, carry: PyTree, u: PyTree, y: PyTree, external: bool) -> Node:
    try:
        check_custom_rules(vertex.cell.apply, params, carry, u)
        return _analyse_node(vertex.name, vertex.cell.apply, params, carry, u, y, external)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(f"Node '{vertex.name}' {_CLOSED_RULE} JAX said: {error}") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"Node '{vertex.name}' has no reverse-mode derivative, which every gradient here is made of, as jax.grad "
            f"of it has none; use lax.scan or a loop of fixed length in place of a while loop, and "
            f"unique_indices=True where places are multiplied. JAX said: {type(error).__name__}: {error}"
        ) from error


def _analyse_node(
    name: str, apply: Callable, params: PyTree, carry: PyTree, x: PyTree, y: PyTree, external: bool
) -> Node:
    """Find F, g, the program of a step and its VJP, and in it which rows each parameter has and how units mix.

    Cost: one trace of the cell and one of its VJP, and labels of the size of the program's arrays, without the axes
    along which a label does not change: for most weights, one of two; no values are computed.
    """
    aside = range(len(jax.tree.leaves(x))) if external else ()
    view_p, view_u, view_y = RealView(params), RealView(x, aside), RealView(y)
    cut, view_h = cut_cell(apply, view_p, RealView(carry), view_u, view_y)
    units = units_of(view_h)
    found = vjp_program(cut, (view_p, view_h, view_u), units)
    pairs = zip(view_p.names, found.program.cuts.outputs, strict=True)
    leaves = tuple(_leaf(leaf, atom, found.exact) for leaf, atom in pairs)
    recurrence, why = _recurrence(found)
    if view_h.size == 0:
        leaves = tuple(Leaf(leaf, Reach.NONE, None, "no carry") for leaf in view_p.names)
        recurrence, why = Recurrence.FEED_FORWARD, "no carry"
    return Node(
        name, apply, view_p, view_h, view_u, view_y, cut, units, found.program, leaves, recurrence, why
    )  # fmt: skip


def _leaf(name: str, atom: Atom, flow: Labelling) -> Leaf:
    label = flow.of(atom)
    if label is None or thin.core(label.empty).all():
        return Leaf(name, Reach.NONE, None, "never reaches the carry")
    if not label.pure:
        reason = f"an entry reaches several units within a step ({flow.culprits[atom]})"
        return Leaf(name, Reach.DENSE, None, reason)
    return Leaf(name, Reach.LOCAL, thin.compact(label.unit), "each entry reaches one unit")


def _recurrence(found: Found) -> tuple[Recurrence, str]:
    if found.localised is found.exact:
        return Recurrence.ELEMENTWISE, "each unit depends on its own past alone"
    if found.localised is None:
        reason = f"units coupled in a way that labels cannot cut ({found.mixing}): blocks from the full Jacobian"
        return Recurrence.DENSE, reason
    dots = len(found.localised.local_dots)
    reason = f"units coupled by {dots} matrix product{'s' * (dots != 1)}, cut to the unit-local entries"
    return Recurrence.LOCALISED, reason


def _carried(name: str, wire: Wire, x: PyTree, outputs: dict[int, PyTree]) -> PyTree:
    """Shapes of what a wire carries."""
    try:
        return jax.eval_shape(lambda x, outputs: connect(wire, x, outputs), x, outputs)
    except ValueError as error:
        raise ValueError(f"Node '{name}': {error}") from error


def _layer_avals(vertex: Vertex, what: str, tree: PyTree) -> PyTree:
    """Shapes of one layer: without the leading axis L of a ``stack(cell, depth=L)``."""
    if vertex.depth is None:
        return tree
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if leaf.shape[:1] != (vertex.depth,):
            raise ValueError(
                f"Node '{vertex.name}' has depth={vertex.depth}, so every leaf of its {what} needs a leading axis of "
                f"that size{' behind the batch axis' if what == 'carry' else ''}; seen shape {leaf.shape} at "
                f"'{jax.tree_util.keystr(path, simple=True, separator='/')}'."
            )
    return jax.tree.map(lambda leaf: shape_and_dtype(leaf, 1), tree)


def describe(tree: PyTree) -> str:
    """Shapes and dtypes of a pytree in one short line."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)).replace("'", "")


def _are_alike(a: PyTree, b: PyTree) -> bool:
    """Whether structures, shapes and dtypes are the same."""
    kinds = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and operator.eq(*kinds)


def _check_cell(vertex: Vertex, params: PyTree, carry: PyTree, u: PyTree) -> PyTree:
    """Shapes of the node's output; the cell must give back a carry like the one it got."""
    try:
        result = jax.eval_shape(vertex.cell.apply, params, carry, u)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(f"Node '{vertex.name}' {_CLOSED_RULE} JAX said: {error}") from error
    except Exception as error:
        raise ValueError(
            f"Node '{vertex.name}' could not be applied to one example of input {describe(u)} and carry "
            f"{describe(carry)} with its params. Check that params and carry are those of this node and that the "
            f"input has the features it was initialised for. The cell said: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"Node '{vertex.name}': a cell returns (carry, y); seen {type(result).__name__}.")
    carry_t, y = result
    if not _are_alike(carry_t, carry):
        raise ValueError(
            f"Node '{vertex.name}' must return a carry of the structure, shapes and dtypes that it was given: given "
            f"{describe(carry)}, returned {describe(carry_t)}. Give an initial carry of the returned kind, or cast "
            f"inside the cell. A cell returns (carry, y), in this order, for ONE step of one example, and is "
            f"initialised on ONE step of a batch, xs[0]."
        )
    if vertex.depth is not None and not _are_alike(y, u):
        raise ValueError(
            f"Node '{vertex.name}' has depth={vertex.depth}: each layer feeds the next, so its output must be shaped "
            f"as its input; seen input {describe(u)} and output {describe(y)}. Put a projection before it."
        )
    return y
