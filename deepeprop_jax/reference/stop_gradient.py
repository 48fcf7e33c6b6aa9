"""The references of deep e-prop: reverse mode through networks whose derivatives are cut by ``stop_gradient``.

Deep e-prop is *exactly* the gradient of a network of localised cells, and a finite ``hops`` is exactly a
``stop_gradient`` on incoming carries. Both are written here in plain reverse mode, without traces and without any of
the library's own analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.network.cell import Cell, Graph, PyTree, Vertex, Wire, assemble, connect, graph_of, parents, select
from deepeprop_jax.reference.backpropagation import Apply, LossFn, Pair, Run, is_differentiable, reverse_mode


class Layer(NamedTuple):
    """One node after every ``stack(cell, depth=L)`` has been written out as L nodes.

    Attributes:
      name: the node's name; ``name[l]`` for layer l of a deep node.
      pair: its F and g.
      wire: how its input is made of the outputs of the layers before it.
      vertex: index of its node in the network's graph.
      layer: l for layer l of a deep node, else None.
    """

    name: str
    pair: Pair
    wire: Wire
    vertex: int
    layer: int | None


def unfold(network: Cell, pairs: Sequence[Pair]) -> tuple[list[Layer], Wire]:
    """The nodes of a network with deep nodes written out, and the wire of the network's output.

    Args:
      network: a cell or a network of cells.
      pairs: F and g of each node, in the order of ``graph_of(network).nodes``.

    Raises:
      ValueError: another number of pairs than of nodes.
    """
    graph = graph_of(network)
    if len(pairs) != len(graph.nodes):
        raise ValueError(
            f"One Pair per node is needed, in the order {[node.name for node in graph.nodes]}; seen {len(pairs)} pairs."
        )
    layers: list[Layer] = []
    top: dict[int, int] = {}
    for vertex, (node, pair) in enumerate(zip(graph.nodes, pairs, strict=True)):
        wire = _reindex(node.wire, top)
        if node.depth is None:
            layers.append(Layer(node.name, pair, wire, vertex, None))
        for index in range(node.depth or 0):
            layers.append(Layer(f"{node.name}[{index}]", pair, wire, vertex, index))
            wire = len(layers) - 1
        top[vertex] = len(layers) - 1
    return layers, _reindex(graph.output, top)


def _reindex(wire: Wire, index: dict[int, int]) -> Wire:
    if isinstance(wire, str):
        return wire
    if isinstance(wire, int):
        return index[wire]
    if isinstance(wire, dict):
        return {name: _reindex(part, index) for name, part in wire.items()}
    return tuple(_reindex(part, index) for part in wire)


def part_of(tree: PyTree, graph: Graph, layer: Layer) -> PyTree:
    """A layer's own part of the network's params, or of its carry for one example."""
    own = select(tree, graph.nodes[layer.vertex].path)
    return own if layer.layer is None else jax.tree.map(lambda leaf: leaf[layer.layer], own)


def whole_of(graph: Graph, layers: Sequence[Layer], parts: Sequence[PyTree], like: PyTree) -> PyTree:
    """The inverse of ``part_of`` over all layers, as a pytree of the same kind as ``like``."""
    values = []
    for vertex in range(len(graph.nodes)):
        own = [part for layer, part in zip(layers, parts, strict=True) if layer.vertex == vertex]
        deep = graph.nodes[vertex].depth is not None
        values.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *own) if deep else own[0])
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(assemble(graph, values)))


def localised(pair: Pair) -> Apply:
    """A cell with the same values and other derivatives: its carry depends on the one before through D alone.

        h_t = F(θ, sg(h_{t-1}), u_t) + D · (h_{t-1} − sg(h_{t-1}))        D = sg(unit-local blocks of ∂F/∂h_{t-1})
        y_t = g(θ, h_t, h_{t-1}, u_t)

    A unit is one index of a carry leaf's full shape; leaves of equal shape share their units, so that unit i of an LSTM
    is (c_i, h_i); a complex leaf is two real leaves of its shape. D keeps the derivatives of a unit's new carry in its
    own old one. Everything else is exact, also g. Eq. 6 of Millidge (arXiv:2512.24506) with its sentence dh_i/dθ_j = 0,
    j ≠ i.

    *Cost*: one ``jax.jacrev`` of F in its carry, O(n) backward passes per step.

    Args:
      pair: the cell as F and g.

    Returns:
      ``apply(params, carry_tm1, x) -> (carry_t, y)`` for one example.
    """

    def apply(params: PyTree, carry_tm1: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        constant = lax.stop_gradient(carry_tm1)
        carry_t = pair.carry(params, constant, x)
        blocks = _unit_local_blocks(pair, lax.stop_gradient(params), constant, lax.stop_gradient(x))
        change = [h - lax.stop_gradient(h) for h in real_leaves(carry_tm1)]
        values = [
            value + sum(block * change[source] for source, block in row.items()).astype(value.dtype) if row else value
            for value, row in zip(real_leaves(carry_t), blocks, strict=True)
        ]
        carry_t = with_real_leaves(carry_t, values)
        return carry_t, pair.output(params, carry_t, carry_tm1, x)

    return apply


def real_leaves(tree: PyTree) -> list[jax.Array]:
    """The differentiable leaves, a complex one as its real and its imaginary part."""
    reals: list[jax.Array] = []
    for leaf in filter(is_differentiable, jax.tree.leaves(tree)):
        reals += [jnp.real(leaf), jnp.imag(leaf)] if jnp.iscomplexobj(leaf) else [jnp.asarray(leaf)]
    return reals


def with_real_leaves(tree: PyTree, reals: Sequence[jax.Array]) -> PyTree:
    """The inverse of ``real_leaves``; leaves that are not differentiable come from ``tree``."""
    values = iter(reals)

    def rebuild(leaf: jax.Array) -> jax.Array:
        if not is_differentiable(leaf):
            return leaf
        return lax.complex(next(values), next(values)) if jnp.iscomplexobj(leaf) else next(values)

    return jax.tree.map(rebuild, tree)


def _unit_local_blocks(pair: Pair, params: PyTree, carry: PyTree, x: PyTree) -> list[dict[int, jax.Array]]:
    """Per real leaf of the new carry: {index of a real leaf of the old carry of equal shape: ∂(unit)/∂(same unit)}."""

    def new_carry(reals: list[jax.Array]) -> list[jax.Array]:
        return real_leaves(pair.carry(params, with_real_leaves(carry, reals), x))

    old_leaves = real_leaves(carry)
    jacobians = jax.jacrev(new_carry)(old_leaves) if old_leaves else []
    blocks = []
    for row in jacobians:
        local = {}
        for source, (jacobian, leaf) in enumerate(zip(row, old_leaves, strict=True)):
            if jacobian.shape == leaf.shape * 2:
                diagonal = jnp.diagonal(jacobian.reshape(leaf.size, leaf.size))
                local[source] = lax.stop_gradient(diagonal.reshape(leaf.shape))
        blocks.append(local)
    return blocks


def distances(layers: Sequence[Layer], recurrent: Sequence[bool]) -> np.ndarray:
    """``[k, v]``: recurrent nodes entered on the shortest path from k up to v, k itself not counted; inf: no path."""
    distance = np.full((len(layers), len(layers)), np.inf)
    for source in range(len(layers)):
        distance[source, source] = 0
        for node in range(source + 1, len(layers)):
            below = [distance[source, parent] for parent in parents(layers[node].wire)]
            distance[source, node] = min(below, default=np.inf) + recurrent[node]
    return distance


def stop_gradient_oracle(
    network: Cell, loss_fn: LossFn, pairs: Sequence[Pair], *, localise: bool = True, hops: int | None = None
) -> Run:
    """The gradient that deep e-prop, or RTRL cut at ``hops``, must give: reverse mode with ``stop_gradient``.

    With ``localise`` every node is replaced by its ``localised`` cell; without, it is exact. With ``hops = m`` the
    gradient of node k's parameters takes every node more than m hops above k with ``stop_gradient`` on its incoming
    carry at every step. The distance counts the recurrent nodes (those with real numbers in their carry) entered on the
    shortest path upward from k, k itself not counted; feed-forward nodes are free. A ``stack(cell, depth=L)`` counts as
    its L layers.

    *Cost*: memory O(T); O(n) times the time of BPTT where ``localise``; one gradient per distinct set of stopped nodes.

    Args:
      network: a cell or a network of cells.
      loss_fn: one step's loss on the batched output.
      pairs: F and g of each node, in the order of ``graph_of(network).nodes``; for a deep node those of one layer.
      localise: replace each ∂F/∂h by its unit-local blocks.
      hops: how far a parameter's temporal credit is carried; None: all the way.

    Returns:
      ``run(params, carry, xs, targets, resets=None, valid=None) -> ((loss, final_carry), grads)``.

    Raises:
      ValueError: another number of pairs than of nodes, or negative ``hops``.
    """
    if hops is not None and hops < 0:
        raise ValueError(f"hops counts recurrent nodes: needed None or an integer >= 0, seen {hops!r}.")
    graph = graph_of(network)
    layers, output = unfold(network, pairs)
    cells = [localised(layer.pair) if localise else layer.pair.apply for layer in layers]

    def cut_apply(stopped: jax.Array) -> Apply:
        """The network in which node v's incoming carry is a constant where ``stopped[v]``."""

        def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            new: list[PyTree] = []
            outputs: dict[int, PyTree] = {}
            for node, (layer, cell) in enumerate(zip(layers, cells, strict=True)):
                carry_tm1 = part_of(carry, graph, layer)
                carry_tm1 = jax.tree.map(
                    lambda leaf, node=node: jnp.where(stopped[node], lax.stop_gradient(leaf), leaf), carry_tm1
                )
                carry_t, outputs[node] = cell(part_of(params, graph, layer), carry_tm1, connect(layer.wire, x, outputs))
                new.append(carry_t)
            return whole_of(graph, layers, new, like=carry), connect(output, x, outputs)

        return apply

    def run(params, carry, xs, targets, resets=None, valid=None):
        recurrent = [bool(real_leaves(select(carry, graph.nodes[layer.vertex].path))) for layer in layers]
        far = distances(layers, recurrent) > (np.inf if hops is None else hops)
        # Nodes that a source does not reach have no part in its gradient: stopping none of them merges equal sets.
        far &= np.isfinite(distances(layers, recurrent))
        distinct, source_row = np.unique(far, axis=0, return_inverse=True)
        source_row = source_row.reshape(-1)

        def gradient(stopped: jax.Array) -> tuple[tuple[jax.Array, PyTree], PyTree]:
            return reverse_mode(cut_apply(stopped), loss_fn)(params, carry, xs, targets, resets, valid)

        # One compiled program for all sets; each holds the gradient of every node, of which its own sources' is kept.
        results, grads = lax.map(gradient, jnp.asarray(distinct))
        kept = []
        for node, vertex in enumerate(graph.nodes):
            rows = np.array([row for layer, row in zip(layers, source_row, strict=True) if layer.vertex == node])
            kept.append(keep_rows(select(grads, vertex.path), vertex, rows))
        grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(assemble(graph, kept)))
        return jax.tree.map(lambda leaf: leaf[0], results), grads

    return run


def keep_rows(grads: PyTree, vertex: Vertex, rows: np.ndarray) -> PyTree:
    """Of gradients stacked over the distinct sets, the one of each source's own set."""
    if vertex.depth is None:
        return jax.tree.map(lambda leaf: leaf[rows[0]], grads)
    return jax.tree.map(lambda leaf: leaf[rows, np.arange(vertex.depth)], grads)
