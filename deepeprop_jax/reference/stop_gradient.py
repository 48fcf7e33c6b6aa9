"""The references of deep e-prop: reverse mode through networks whose derivatives are cut by ``stop_gradient``.

Deep e-prop is *exactly* the gradient of a network of localised cells, a finite ``hops`` is exactly a ``stop_gradient``
on incoming carries, and exact credit inside a segment is true cells inside it, localised ones before. All are written
here in plain reverse mode, without traces and without any of the library's own analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.network.cell import (
    Cell,
    Graph,
    PyTree,
    Wire,
    assemble,
    connect,
    graph_of,
    parents,
    rewired,
    select,
)
from deepeprop_jax.reference.backpropagation import (
    Apply,
    LossFn,
    Pair,
    Run,
    is_differentiable,
    real_leaves,
    reverse_mode,
    with_real_leaves,
)


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
    """The nodes of a network with deep nodes written out, and the wire of the network's output; a ``ValueError`` for
    another number of pairs than of nodes."""
    graph = graph_of(network)
    if len(pairs) != len(graph.nodes):
        raise ValueError(
            f"One Pair per node is needed, in the order {[node.name for node in graph.nodes]}; seen {len(pairs)} pairs."
        )
    layers: list[Layer] = []
    top: dict[int, int] = {}

    def written(source: int | str) -> Wire:
        return source if isinstance(source, str) else top[source]

    for vertex, (node, pair) in enumerate(zip(graph.nodes, pairs, strict=True)):
        wire = rewired(node.wire, written)
        if node.depth is None:
            layers.append(Layer(node.name, pair, wire, vertex, None))
        for index in range(node.depth or 0):
            layers.append(Layer(f"{node.name}[{index}]", pair, wire, vertex, index))
            wire = len(layers) - 1
        top[vertex] = len(layers) - 1
    return layers, rewired(graph.output, written)


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


def _distances(layers: Sequence[Layer], recurrent: Sequence[bool]) -> np.ndarray:
    """``[k, v]``: recurrent nodes entered on the shortest path from k up to v, k itself not counted; inf: no path."""
    distance = np.full((len(layers), len(layers)), np.inf)
    for source in range(len(layers)):
        distance[source, source] = 0
        for node in range(source + 1, len(layers)):
            below = [distance[source, parent] for parent in parents(layers[node].wire)]
            distance[source, node] = min(below, default=np.inf) + recurrent[node]
    return distance


def stop_gradient_oracle(
    network: Cell,
    loss_fn: LossFn,
    pairs: Sequence[Pair],
    *,
    localise: bool = True,
    hops: int | None = None,
    segment_length: int | None = None,
) -> Run:
    """The gradient that deep e-prop, or RTRL cut at ``hops``, must give: reverse mode with ``stop_gradient``.

    With ``localise`` every node is replaced by its ``localised`` cell; without, it is exact. With ``hops = m`` the
    gradient of node k's parameters takes every node more than m hops above k with ``stop_gradient`` on its incoming
    carry at every step. The distance counts the recurrent nodes (those with real numbers in their carry) entered on the
    shortest path upward from k, k itself not counted; feed-forward nodes are free. A ``stack(cell, depth=L)`` counts as
    its L layers.

    With ``segment_length = C`` it is that of ``value_and_grad(..., segment_length=C, within_segment="exact")``: for
    each segment of C steps (the last may be shorter) the loss of that segment alone, with the cells above before its
    start and true cells inside it, where ``hops`` stops the carry that enters alone; the gradients are summed.

    *Cost*: memory O(T); O(n) times the time of BPTT where ``localise``; one gradient per distinct set of stopped nodes,
    and per segment one such pass and one of BPTT.

    Args:
      network, loss_fn: as for ``bptt``.
      pairs: F and g of each node, in the order of ``graph_of(network).nodes``; for a deep node those of one layer.

    Raises:
      ValueError: another number of pairs than of nodes, or negative ``hops``.
    """
    if hops is not None and hops < 0:
        raise ValueError(f"hops counts recurrent nodes: needed None or an integer >= 0, seen {hops!r}.")
    graph = graph_of(network)
    layers, output = unfold(network, pairs)
    cells = [localised(layer.pair) if localise else layer.pair.apply for layer in layers]

    def cut_apply(stopped: jax.Array) -> Apply:
        """The network in which node v's incoming carry is a constant where ``stopped[v]``; but inside a segment all are
        true cells, and the carry that enters it alone is a constant."""

        def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            x, inside, entering = x
            new: list[PyTree] = []
            outputs: dict[int, PyTree] = {}
            for node, (layer, cell) in enumerate(zip(layers, cells, strict=True)):
                stop = stopped[node] if inside is None else stopped[node] & (~inside | entering)
                theta, u = part_of(params, graph, layer), connect(layer.wire, x, outputs)
                carry_tm1 = part_of(carry, graph, layer)
                carry_tm1 = _where(stop, lax.stop_gradient(carry_tm1), carry_tm1)
                step = cell(theta, carry_tm1, u)
                if inside is not None:
                    step = _where(inside, layer.pair.apply(theta, carry_tm1, u), step)
                new.append(step[0])
                outputs[node] = step[1]
            return whole_of(graph, layers, new, like=carry), connect(output, x, outputs)

        return apply

    def counted_loss(y: PyTree, target: tuple[PyTree, jax.Array | None]) -> jax.Array:
        loss = loss_fn(y, target[0])
        return loss if target[1] is None else jnp.where(target[1], loss, 0)

    def run(params, carry, xs, targets, resets=None, valid=None):
        length, batch = jax.tree.leaves(xs)[0].shape[:2]
        step, starts = jnp.arange(length), jnp.arange(0, length, segment_length or length)
        distinct, source_row = _stopped_sets(graph, layers, carry, hops)

        def gradient(case: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, PyTree], PyTree]:
            stopped, start = case
            inside, entering, counted = None, None, None
            if segment_length is not None:
                flags = step[:, None] >= start, step[:, None] == start
                inside, entering = (jnp.broadcast_to(flag, (length, batch)) for flag in flags)
                counted = (step >= start) & (step < start + segment_length)
            run_cut = reverse_mode(cut_apply(stopped), counted_loss)
            return run_cut(params, carry, (xs, inside, entering), (targets, counted), resets, valid)

        # One compiled program for all sets; each holds the gradient of every node, of which its own sources' is kept.
        cases = (jnp.repeat(jnp.asarray(distinct), len(starts), axis=0), jnp.tile(starts, len(distinct)))
        (losses, ends), grads = lax.map(gradient, cases)
        per_set = jax.tree.map(lambda leaf: leaf.reshape(len(distinct), len(starts), *leaf.shape[1:]), grads)
        per_set = jax.tree.map(lambda leaf: leaf.sum(1) if is_differentiable(leaf) else leaf[:, 0], per_set)
        own = [
            part_of(jax.tree.map(lambda leaf, row=row: leaf[row], per_set), graph, layer)
            for layer, row in zip(layers, source_row, strict=True)
        ]
        grads = whole_of(graph, layers, own, like=params)
        return (losses[: len(starts)].sum(), jax.tree.map(lambda leaf: leaf[0], ends)), grads

    return run


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _stopped_sets(
    graph: Graph, layers: Sequence[Layer], carry: PyTree, hops: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sets of nodes stopped for a source, (sets, nodes) bool, and each source's row in them."""
    recurrent = [bool(real_leaves(select(carry, graph.nodes[layer.vertex].path))) for layer in layers]
    distance = _distances(layers, recurrent)
    # Nodes that a source does not reach have no part in its gradient: stopping none of them merges equal sets.
    far = (distance > (np.inf if hops is None else hops)) & np.isfinite(distance)
    distinct, source_row = np.unique(far, axis=0, return_inverse=True)
    return distinct, source_row.reshape(-1)


def segment_oracle(
    network: Cell,
    loss_fn: LossFn,
    pairs: Sequence[Pair],
    *,
    segment_length: int,
    localise: bool = True,
    hops: int | None = None,
) -> Run:
    """``stop_gradient_oracle`` with exact credit inside segments; see there."""
    return stop_gradient_oracle(network, loss_fn, pairs, localise=localise, hops=hops, segment_length=segment_length)
