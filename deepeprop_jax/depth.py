"""``stack(cell, depth=L)``: the layer functions under one ``lax.scan`` over depth, so L does not enter the program.

The influences of all source layers stand one behind the other. Layer l keeps a trace of the min(l, ``band``) source
layers below it. All kept pairs (l, k) lie one after the other, by l and then by k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax import layer as one
from deepeprop_jax import low_rank
from deepeprop_jax.cut import Reals
from deepeprop_jax.devices import vary_like
from deepeprop_jax.influence import Influence
from deepeprop_jax.layer import LayerGradient, Moment, Past
from deepeprop_jax.node import Node, to_grid
from deepeprop_jax.plan import Plan
from deepeprop_jax.real import Parts, PyTree
from deepeprop_jax.trace import add_columns, contract


class DeepTraces(NamedTuple):
    """The traces of a node with depth, for its own parameters.

    Attributes:
      own: per block, (L, batch, rows, columns): each layer's influence of its own parameters.
      band: (pairs, batch, n, columns): of the ``band`` layers below, see ``kept_pairs``; None if none is kept.
    """

    own: tuple[jax.Array, ...]
    band: jax.Array | None


class KeptPairs(NamedTuple):
    """The pairs of layers whose influence is kept, those of a layer one after the other.

    Attributes:
      target, source: (pairs,) the layer that is influenced, and whose parameters influence it.
      start: (L,) per layer, where its pairs start.
    """

    target: np.ndarray
    source: np.ndarray
    start: np.ndarray


def kept_pairs(depth: int, band: int) -> KeptPairs:
    """Every layer with each of the at most ``band`` layers below it."""
    count = np.minimum(np.arange(depth), band)
    start = np.cumsum(count) - count
    target = np.repeat(np.arange(depth), count)
    return KeptPairs(target, np.arange(target.size) - start[target] + target - count[target], start)


class Place(NamedTuple):
    """Where a pair of layers lies among those kept; anywhere if it is not."""

    kept: jax.Array
    index: jax.Array


def place_of(depth: int, band: int, target: jax.Array, source: jax.Array) -> Place:
    """Of one pair of layers."""
    pairs, first = kept_pairs(depth, band), jnp.maximum(target - band, 0)
    index = jnp.asarray(pairs.start)[target] + source - first
    return Place((source >= first) & (source < target), jnp.clip(index, 0, pairs.target.size - 1))


def put_pairs(held: jax.Array, found: jax.Array, target: jax.Array, band: int) -> jax.Array:
    """(pairs, ...) with what ``target`` owes to every layer, (L, ...), in the place of its own."""

    def body(held: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        source, new = now
        place = place_of(found.shape[0], band, target, source)
        old = _layer_of(held, place.index)
        return _with_layer(held, jnp.where(place.kept, new, old), place.index), None

    return jax.lax.scan(body, held, (jnp.arange(found.shape[0]), found))[0]


def _layer_of(array: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def _with_layer(array: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, new, index, 0)


def columns_of(node: Node, wanted: tuple[int, ...], columns: jax.Array, held: tuple[int, ...]) -> jax.Array:
    """The columns of the leaves ``wanted`` among those of ``held``: (..., columns)."""
    if wanted == held:
        return columns
    ends = np.cumsum([node.params.sizes[i] for i in held])[:-1]
    parts = dict(zip(held, jnp.split(columns, ends, axis=-1), strict=True))
    return jnp.concatenate([parts[i] for i in wanted], axis=-1)


def _layers_first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tree)


def forward(node: Node, params: PyTree, carry_tm1: PyTree, x: PyTree, depth: int) -> tuple[PyTree, PyTree, Moment]:
    """``layer.forward`` through L layers; the moment's leaves have a leading axis L."""

    def body(u: PyTree, layer: tuple[PyTree, PyTree]) -> tuple[PyTree, tuple[PyTree, Moment]]:
        carry_t, y, moment = one.forward(node, layer[0], layer[1], u)
        return y, (carry_t, moment)

    y, (carry_t, moment) = jax.lax.scan(body, x, (params, _layers_first(carry_tm1)), length=depth)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), carry_t), y, moment


def local_blocks(node: Node, moment: Moment) -> jax.Array:
    """D of every layer, (L, batch, K, K, units)."""
    return jax.lax.map(lambda layer_moment: one.local_blocks(node, layer_moment), moment)


def reverse(node: Node, moment: Moment, blocks: jax.Array | None, dy: Reals) -> LayerGradient:
    """``layer.reverse`` from the top layer down; params and carry cotangents have a leading axis L."""

    def body(dy: Reals, layer: tuple[Moment, jax.Array | None]) -> tuple[Reals, tuple[Reals, jax.Array | None]]:
        gradient = one.reverse(node, layer[0], layer[1], dy)
        return gradient.input, (gradient.params, gradient.carry)

    du, (params, carry) = jax.lax.scan(body, dy, (moment, blocks), reverse=True)
    return LayerGradient(params, carry, du)


def update(
    plan: Plan,
    v: int,
    moment: Moment,
    blocks: jax.Array | None,
    own_tm1: DeepTraces,
    cross_tm1: dict[int, jax.Array],
    from_below: dict[int, Influence],
) -> tuple[DeepTraces, dict[int, jax.Array], dict[int, Influence]]:
    """One step of all traces of a node with depth, layer by layer upward.

    Args:
      own_tm1: the node's own traces.
      cross_tm1: per node k below with a kept influence, (layers, batch, n, columns).
      from_below: per node k below, U^{v,k} at the bottom layer.

    Returns:
      The same traces one step on, and Y^{v,k} at the top layer for the sources that are passed on (v itself included).
    """
    node, depth, columns, band = plan.nodes[v], plan.depth(v), plan.columns[v], plan.bands[v]
    wanted = plan.wanted(v)
    batch = _batch_size(moment.input)
    pairs = {k: plan.pairs[v, k] for k in cross_tm1}
    padded = {k: _pad_layers(trace, depth) for k, trace in cross_tm1.items()}
    inside = {k: u.multiplied_out(batch, node.input.size, plan.dtype) for k, u in from_below.items()}
    if wanted.own_output:
        inside[v] = jnp.zeros((depth, batch, node.input.size, columns), plan.dtype)
    inside = vary_like(inside, moment)

    def body(passed: tuple[dict[int, jax.Array], jax.Array | None], layer):
        below, band_t = passed
        index, layer_moment, layer_blocks, layer_own, layer_cross = layer
        partial = one.partials(node, layer_moment, layer_blocks, wanted, plan.dtype)
        own_t = one.own_influence(node, partial, wanted.own, layer_own)
        above, cross_t = {}, {}
        for k, influence in below.items():
            if k == v:
                continue
            past = Past(layer_cross[k], _within_hops(plan, v, k, index)) if k in pairs else None
            arriving = _influence(plan, k, influence)
            cross_t[k], output = one.cross_influence(node, partial, past, arriving, wanted.output)
            above[k] = influence if output is None else output.multiplied_out(batch, node.output.size, plan.dtype)
        if wanted.own_output:
            own_y = one.own_output(node, partial, wanted, layer_own, own_t)
            own_y = own_y.multiplied_out(batch, node.output.size, plan.dtype)
            above[v], band_t = _own_upward(node, partial, wanted, below[v], band_t, own_y, index, band)
        return (above, band_t), (own_t, {k: cross_t[k] for k in padded})

    layers = (jnp.arange(depth), moment, blocks, own_tm1.own, padded)
    (above, band_t), (own_t, cross_t) = jax.lax.scan(body, (inside, own_tm1.band), layers, length=depth)
    if v in above:
        above[v] = jnp.moveaxis(above[v], 0, 2).reshape(batch, node.output.size, depth * columns)
    above = {k: _influence(plan, k, y) for k, y in above.items() if (v, k) in plan.transmitted}
    return DeepTraces(own_t, band_t), {k: trace[: pairs[k].layers] for k, trace in cross_t.items()}, above


def _influence(plan: Plan, k: int, columns: jax.Array) -> Influence:
    return Influence(plan.nodes[k], plan.trained[k], whole=columns)


def _own_upward(node, partial, wanted, below, band_tm1, own_y, index, band: int):
    """The influences of all layers of the node one layer up, to layer ``index``; kept ones also move right in time.

    Args:
      below: (L, batch, inputs, columns) of the layers under this one, zero for the others.
      band_tm1: (pairs, batch, n, columns).
      own_y: what this layer's output owes to its own parameters.

    Returns:
      ``below`` and ``band_tm1`` with the new ones in their place.
    """
    depth, batch = below.shape[:2]

    def up(past: Past | None, columns_below: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        arriving = Influence(node, wanted.trained, whole=columns_below)
        trace_t, output = one.cross_influence(node, partial, past, arriving, True)
        return trace_t, output.multiplied_out(batch, node.output.size, below.dtype)

    def above(u: jax.Array, s: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return u, s

    def too_far(u: jax.Array, s: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return up(None, u)[1], s

    def kept(u: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        return up(Past(s), u)[::-1]

    def body(passed: tuple[jax.Array, jax.Array | None], k: jax.Array) -> tuple[Any, None]:
        below, held = passed
        u = _layer_of(below, k)
        if held is None:
            y, _ = jax.lax.cond(k < index, too_far, above, u, None)
            return (_with_layer(below, y, k), None), None
        place = place_of(depth, band, index, k)
        which = jnp.where(k < index, jnp.where(place.kept, 1, 2), 0)
        cases = [above, kept, too_far] if band < depth - 1 else [above, kept]
        y, s = jax.lax.switch(which, cases, u, _layer_of(held, place.index))
        return (_with_layer(below, y, k), _with_layer(held, s, place.index)), None

    (through, band_t), _ = jax.lax.scan(body, (below, band_tm1), jnp.arange(depth))
    return _with_layer(through, own_y, index), band_t


def _within_hops(plan: Plan, v: int, k: int, index: jax.Array) -> jax.Array | None:
    """Which kept columns of source k are within the hops at layer ``index`` of v; None for all."""
    pair = plan.pairs[v, k]
    if pair.mask is None and pair.layers == plan.depth(v):
        return None
    mask = jnp.ones((pair.layers, pair.sources), bool) if pair.mask is None else jnp.asarray(pair.mask)
    rows = jnp.pad(mask, ((0, plan.depth(v) - pair.layers), (0, 0)))
    return jnp.repeat(rows[index], plan.columns[k], total_repeat_length=pair.columns)


def _pad_layers(trace: jax.Array, depth: int) -> jax.Array:
    return jnp.pad(trace, ((0, depth - trace.shape[0]), *((0, 0),) * (trace.ndim - 1)))


def _batch_size(parts: Parts) -> int:
    """Behind the leading axis L."""
    return (parts.real + parts.other)[0].shape[1]


def own_gradient(plan: Plan, k: int, cotangent: jax.Array, traces: dict[str, Any]) -> jax.Array:
    """``lambda . S`` of all influences between a node's own layers, (L, columns).

    Args:
      cotangent: (L, batch, n); also of one layer alone, without a band.
    """
    node, depth = plan.nodes[k], cotangent.shape[0]
    own = traces.get(plan.name(k, k), DeepTraces((), None))
    grads = [jnp.zeros((depth, *shape), plan.dtype) for shape in node.params.shapes]
    for block, trace in zip(plan.own[k], own.own, strict=True):
        part = jax.vmap(lambda c, s, block=block: contract(node, block, c, s))(cotangent, trace)
        add_columns(node.params, grads, block.leaves, part)
    layout = plan.low_rank[k]
    if layout is not None:
        grid = to_grid(cotangent, node.units)
        parts = jax.vmap(lambda s, c: low_rank.contract(layout, s, c))(traces[plan.low_rank_name(k)], grid)
        for block, part in zip(layout.blocks, parts, strict=True):
            add_columns(node.params, grads, block.leaves, part.reshape(depth, -1))
    nothing = [jnp.zeros((depth, 0), plan.dtype)]
    total = jnp.concatenate([grads[i].reshape(depth, -1) for i in plan.trained[k]] or nothing, axis=-1)
    return total if own.band is None else total + _band_gradient(cotangent, own.band, plan.bands[k])


def _band_gradient(cotangent: jax.Array, held: jax.Array, band: int) -> jax.Array:
    """``lambda . S`` of the kept influences between layers, as a gradient per source layer, (L, columns).

    Args:
      cotangent: (L, batch, n).
      held: (pairs, batch, n, columns).
    """
    pairs = kept_pairs(cotangent.shape[0], band)
    found = jnp.einsum("jbn,jbnp->jp", cotangent[pairs.target], held)
    return jnp.zeros((cotangent.shape[0], held.shape[-1]), held.dtype).at[pairs.source].add(found)


def push_pairs(start: jax.Array, held: jax.Array, band: int, total: jax.Array, top: jax.Array) -> jax.Array:
    """Add ``M S`` of the kept influences between layers to what rows owe to every source layer.

    Args:
      start: M, (L, rows, batch, n), what the rows owe to every layer's carry; zero above ``top``.
      held: S, (pairs, batch, n, columns).
      total: (L, batch, rows, columns).
      top: the highest layer that the rows owe anything to.

    Cost: one product of matrices for every pair up to ``top``.
    """
    pairs, total = kept_pairs(start.shape[0], band), vary_like(total, start, held)

    def body(total: jax.Array, pair: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        target, source, matrix = pair

        def times(matrix: jax.Array) -> jax.Array:
            return jnp.einsum("rbn,bnp->brp", start[target], matrix)

        def nothing(matrix: jax.Array) -> jax.Array:
            return jnp.zeros_like(total[0])

        product = jax.lax.cond(target <= top, times, nothing, matrix)
        return _with_layer(total, _layer_of(total, source) + product, source), None

    return jax.lax.scan(body, total, (jnp.asarray(pairs.target), jnp.asarray(pairs.source), held))[0]
