"""The static plan of a network: its nodes after analysis, the influences that are kept, the layout of their traces."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from deepeprop_jax.analysis.node import Node, analyse_node
from deepeprop_jax.jaxpr.program import check_custom_rules, context
from deepeprop_jax.jaxpr.real_leaves import RealView, float32_or_wider, shape_and_dtype
from deepeprop_jax.network.arguments import warn_of_integers
from deepeprop_jax.network.cell import Graph, PyTree, Vertex, Wire, connect, parents, select
from deepeprop_jax.traces.block import Block
from deepeprop_jax.traces.low_rank import Layout, layout_of


class Pair(NamedTuple):
    """A kept influence S^{v,k} of node k's parameters on another node v's carry.

    Attributes:
      layers: how many layers of v keep it, counted from below (1 unless v is a ``stack(cell, depth=L)``).
      sources: how many layers of k it is kept of, counted from above.
      columns: trained parameter entries of those layers.
      mask: (layers, sources) which combinations are within the hops; None for all.
    """

    layers: int
    sources: int
    columns: int
    mask: np.ndarray | None


class Plan(NamedTuple):
    """All that is decided about a network before a value is computed.

    Attributes:
      graph: the network.
      nodes: per vertex, its cell after analysis (of one layer, where the vertex has depth).
      exact, hops, rank: as given to ``deep_eprop``.
      trained: per node, the indices of its trained real parameter leaves.
      columns: per node, the number of trained real parameter entries (of one layer).
      own: per node, the blocks of its own trace, but for those of low rank.
      low_rank: per node, what of its own trace is one product of low rank.
      bands: per node with depth, over how many layers upward its own influences are kept.
      pairs: the kept influences across nodes, by (v, k).
      transmitted: the (p, k) whose output influence Y^{p,k} something above needs.
      dtype: of all traces.
      output: view of the network's output, of one example.
      output_avals: its shapes and dtypes.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    exact: bool
    hops: int | None
    rank: int | None
    trained: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    own: tuple[tuple[Block, ...], ...]
    low_rank: tuple[Layout | None, ...]
    bands: tuple[int, ...]
    pairs: dict[tuple[int, int], Pair]
    transmitted: frozenset[tuple[int, int]]
    dtype: Any
    output: RealView
    output_avals: PyTree

    def depth(self, v: int) -> int:
        """Number of layers of a node: L of a ``stack(cell, depth=L)``, else 1."""
        return self.graph.nodes[v].depth or 1

    def all_columns(self, k: int) -> int:
        """Trained parameter entries of a node, all of its layers together."""
        return self.depth(k) * self.columns[k]

    def leaf_shapes(self, v: int) -> list[tuple[int, ...]]:
        """Shapes of a node's real parameter leaves, with a leading axis L where it has depth."""
        layers = () if self.graph.nodes[v].depth is None else (self.depth(v),)
        return [(*layers, *shape) for shape in self.nodes[v].params.shapes]

    def sources(self, v: int) -> list[int]:
        """Nodes below v whose influence arrives at v: kept there, or passed on."""
        return [k for k in range(v) if (v, k) in self.pairs or (v, k) in self.transmitted]

    def full_jacobian(self, v: int) -> bool:
        """Whether node v's recurrence enters in full: exact mode, where it is not element-wise."""
        return self.exact and self.nodes[v].recurrent and not self.nodes[v].elementwise

    def name(self, v: int, k: int) -> str:
        """The key of S^{v,k} in the state's traces."""
        return f"{self.graph.nodes[v].name} <- {self.graph.nodes[k].name}"

    def low_rank_name(self, v: int) -> str:
        """The key of what of S^{v,v} is of low rank."""
        return f"{self.name(v, v)}, low rank"

    def trace_names(self, v: int) -> list[str]:
        """The keys of all that may be kept of influences on node v's carry."""
        return [*(self.name(v, k) for k in range(v + 1)), self.low_rank_name(v)]


def make_plan(
    graph: Graph,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    exact: bool,
    hops: int | None,
    trainable: PyTree | None,
    known: dict[Any, Node],
) -> Plan:
    """Analyse every node and decide which influences are kept.

    Args:
      params, carry, x: shapes and dtypes, of one example where there is a batch axis.
      trainable: None, booleans shaped as ``params`` or as a prefix of it, or a function of params' shapes giving them.
      known: nodes that were analysed before, in any mode; takes those of this graph.

    Raises:
      ValueError: a node that does not fit its params, carry or input; named.
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
    flags = _trained_leaves(graph, params, trainable)
    trained = tuple(
        tuple(i for i, leaf in enumerate(_leaf_of_real(node)) if node_flags[leaf])
        for node, node_flags in zip(nodes, flags, strict=True)
    )
    columns = tuple(sum(n.params.sizes[i] for i in idx) for n, idx in zip(nodes, trained, strict=True))
    dtypes = [dtype for node in nodes for dtype in node.params.dtypes + node.carry.dtypes]
    dtype = float32_or_wider(*dtypes)
    output_avals = _carried("outputs", graph.output, x, outputs)
    output = RealView(output_avals)
    nothing: tuple[Any, Any, Any, Any, Any] = ((), (), (), {}, frozenset())
    plan = Plan(graph, tuple(nodes), exact, hops, None, trained, columns, *nothing, dtype, output, output_avals)
    own = tuple(_own_blocks(plan, v) for v in range(len(nodes)))
    bands = tuple(_band(plan, v) for v in range(len(nodes)))
    pairs, transmitted = _kept_pairs(plan)
    whole: tuple[Layout | None, ...] = (None,) * len(nodes)
    return plan._replace(own=own, low_rank=whole, bands=bands, pairs=pairs, transmitted=transmitted)


def with_rank(plan: Plan, rank: int) -> Plan:
    """The plan with own traces of low rank, where weights' influences are outer products."""
    layouts = tuple(layout_of(node, own, rank) for node, own in zip(plan.nodes, plan.own, strict=True))
    gone = [set() if layout is None else {block.leaves for block in layout.blocks} for layout in layouts]
    own = tuple(
        tuple(block for block in blocks if block.leaves not in leaves)
        for blocks, leaves in zip(plan.own, gone, strict=True)
    )
    return plan._replace(rank=rank, own=own, low_rank=layouts)


_CLOSED_RULE = (
    "keeps a traced value where JAX cannot follow it, and jax.grad through a scan fails likewise. Does a custom_jvp or "
    "custom_vjp function read a parameter, the carry or the input by closure, or as one of nondiff_argnums? Make it an "
    "argument, and let the rule give its derivative too, which may be zero."
)


def _analyse(vertex: Vertex, params: PyTree, carry: PyTree, u: PyTree, y: PyTree, external: bool) -> Node:
    try:
        check_custom_rules(vertex.cell.apply, params, carry, u)
        return analyse_node(vertex.name, vertex.cell.apply, params, carry, u, y, external)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(f"Node '{vertex.name}' {_CLOSED_RULE} JAX said: {error}") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"Node '{vertex.name}' has no reverse-mode derivative, which every gradient here is made of, as jax.grad "
            f"of it has none; use lax.scan or a loop of fixed length in place of a while loop, and "
            f"unique_indices=True where places are multiplied. JAX said: {type(error).__name__}: {error}"
        ) from error


# --- shapes ----------------------------------------------------------------------------------------------------------


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
    if jax.tree.structure(carry_t) != jax.tree.structure(carry) or any(
        (new.shape, new.dtype) != (old.shape, old.dtype)
        for new, old in zip(jax.tree.leaves(carry_t), jax.tree.leaves(carry), strict=False)
    ):
        raise ValueError(
            f"Node '{vertex.name}' must return a carry of the structure, shapes and dtypes that it was given: given "
            f"{describe(carry)}, returned {describe(carry_t)}. Give an initial carry of the returned kind, or cast "
            f"inside the cell. A cell returns (carry, y), in this order, for ONE step of one example, and is "
            f"initialised on ONE step of a batch, xs[0]."
        )
    if vertex.depth is not None and (
        jax.tree.structure(y) != jax.tree.structure(u)
        or [(a.shape, a.dtype) for a in jax.tree.leaves(y)] != [(a.shape, a.dtype) for a in jax.tree.leaves(u)]
    ):
        raise ValueError(
            f"Node '{vertex.name}' has depth={vertex.depth}: each layer feeds the next, so its output must be shaped "
            f"as its input; seen input {describe(u)} and output {describe(y)}. Put a projection before it."
        )
    return y


def _leaf_of_real(node: Node) -> list[int]:
    """For each real parameter leaf, the index of the params leaf that it is (part of)."""
    counts = {"real": 1, "complex": 2, "other": 0}
    return [i for i, kind in enumerate(node.params.kinds) for _ in range(counts[kind])]


def _trained_leaves(graph: Graph, params: PyTree, trainable: PyTree | None) -> tuple[tuple[bool, ...], ...]:
    if trainable is None:
        full = jax.tree.map(lambda _: True, params)
    else:
        mask = trainable(params) if callable(trainable) else trainable
        try:
            full = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, params)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"trainable must be booleans in the structure of params, or of a prefix of it; seen "
                f"{jax.tree.structure(mask)} for params {jax.tree.structure(params)}."
            ) from error
    result = []
    for vertex in graph.nodes:
        flags = jax.tree.leaves(select(full, vertex.path))
        wrong = [flag for flag in flags if not isinstance(flag, bool | np.bool_)]
        if wrong:
            raise ValueError(f"trainable must hold booleans; seen {wrong[0]!r} at node '{vertex.name}'.")
        warn_of_integers(vertex.name, select(params, vertex.path), flags)
        result.append(tuple(bool(flag) for flag in flags))
    return tuple(result)


# --- what is kept ----------------------------------------------------------------------------------------------------


def _own_blocks(plan: Plan, v: int) -> tuple[Block, ...]:
    """One block per leaf that is local, one for all that are dense together."""
    node = plan.nodes[v]
    blocks, dense = [], []
    for i in plan.trained[v]:
        leaf = node.leaves[i]
        if leaf.kind == "none" or node.params.sizes[i] == 0:
            continue
        if leaf.kind == "local" and not plan.full_jacobian(v):
            blocks.append(Block("local", (i,), leaf.unit, node.units.slots, node.params.sizes[i]))
        else:
            dense.append(i)
    if dense:
        columns = sum(node.params.sizes[i] for i in dense)
        blocks.append(Block("dense", tuple(dense), None, node.carry.size, columns))
    return tuple(blocks)


def _band(plan: Plan, v: int) -> int:
    """Layers of a ``stack(cell, depth=L)`` over which an influence is kept: L - 1, or the hops."""
    reach = plan.depth(v) - 1 if plan.nodes[v].recurrent and plan.columns[v] else 0
    return reach if plan.hops is None else min(reach, plan.hops)


def _kept_pairs(plan: Plan) -> tuple[dict[tuple[int, int], Pair], frozenset[tuple[int, int]]]:
    """Distances in recurrent nodes entered, the pairs within the hops, and the outputs that those need."""
    count = len(plan.nodes)
    recurrent = [int(node.recurrent) for node in plan.nodes]
    below = [[p for p in parents(vertex.wire) if plan.nodes[p].output.size] for vertex in plan.graph.nodes]
    distance: dict[tuple[int, int], int] = {}  # from the top layer of k to the bottom layer of v
    pairs: dict[tuple[int, int], Pair] = {}
    for k in range(count):
        if not plan.columns[k]:
            continue
        for v in range(k + 1, count):
            through = [
                0 if p == k else distance[p, k] + (plan.depth(p) - 1) * recurrent[p]
                for p in below[v]
                if p == k or (p, k) in distance
            ]
            if through:
                distance[v, k] = min(through) + recurrent[v]
                pair = _pair(plan, v, k, distance[v, k])
                if pair is not None:
                    pairs[v, k] = pair
    transmitted: set[tuple[int, int]] = set()
    for v in reversed(range(count)):
        for k in range(v):
            if (v, k) in pairs or (v, k) in transmitted:
                transmitted |= {(p, k) for p in below[v] if p == k or (p, k) in distance}
    return pairs, frozenset(transmitted)


def _pair(plan: Plan, v: int, k: int, distance: int) -> Pair | None:
    if not plan.nodes[v].recurrent:
        return None
    # Source layers below the top of k are farther away, one hop each if they are recurrent.
    up = np.arange(plan.depth(v))[:, None]
    down = np.arange(plan.depth(k))[None, ::-1] * int(plan.nodes[k].recurrent)
    far = distance + up + down
    kept = np.ones(far.shape, bool) if plan.hops is None else far <= plan.hops
    if not kept.any():
        return None
    layers, sources = int(kept.any(1).sum()), int(kept.any(0).sum())
    box = kept[:layers, kept.shape[1] - sources :]
    return Pair(layers, sources, sources * plan.columns[k], None if box.all() else box)
