"""``stack(cell, depth=L)``: the layer functions under one ``lax.scan`` over depth, so L does not enter the program.

The influences of all L source layers run beside each other as columns, k-major, behind ``band`` layers of zeros:
columns of source layer k start at (band + k) * columns. Layer l keeps a trace of the ``band`` source layers below it,
which is the window that starts at l * columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax import layer as one
from deepeprop_jax import low_rank
from deepeprop_jax.cut import Reals
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
      band: (L, batch, n, band * columns): of the ``band`` layers below; None if none is kept.
    """

    own: tuple[jax.Array, ...]
    band: jax.Array | None


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
        inside[v] = jnp.zeros((batch, node.input.size, (band + depth) * columns), plan.dtype)

    def body(below: dict[int, jax.Array], layer):
        index, layer_moment, layer_blocks, layer_own, layer_band, layer_cross = layer
        partial = one.partials(node, layer_moment, layer_blocks, wanted, plan.dtype)
        own_t = one.own_influence(node, partial, wanted.own, layer_own)
        above, cross_t, band_t = {}, {}, layer_band
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
            band_t, above[v] = _own_upward(node, partial, wanted, below[v], layer_band, own_y, index, columns, band)
        return above, (own_t, band_t, {k: cross_t[k] for k in padded})

    layers = (jnp.arange(depth), moment, blocks, own_tm1.own, own_tm1.band, padded)
    above, (own_t, band_t, cross_t) = jax.lax.scan(body, inside, layers, length=depth)
    if v in above:
        above[v] = above[v][..., band * columns :]
    above = {k: _influence(plan, k, y) for k, y in above.items() if (v, k) in plan.transmitted}
    return DeepTraces(own_t, band_t), {k: trace[: pairs[k].layers] for k, trace in cross_t.items()}, above


def _influence(plan: Plan, k: int, columns: jax.Array) -> Influence:
    return Influence(plan.nodes[k], plan.trained[k], whole=columns)


def _own_upward(node, partial, wanted, below, band_tm1, own_y, index, columns: int, band: int):
    """The own influences of all layers, one layer up: the window of kept ones also moves right in time."""
    start = index * columns

    def up(past: Past | None, columns_below: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        arriving = Influence(node, wanted.trained, whole=columns_below)
        trace_t, output = one.cross_influence(node, partial, past, arriving, True)
        return trace_t, output.multiplied_out(below.shape[0], node.output.size, below.dtype)

    # All source layers pass through; those in the window have a past as well.
    _, through = up(None, below)
    band_t = band_tm1
    if band:
        window = jax.lax.dynamic_slice_in_dim(below, start, band * columns, axis=2)
        band_t, output = up(Past(band_tm1), window)
        through = jax.lax.dynamic_update_slice_in_dim(through, output, start, axis=2)
    return band_t, jax.lax.dynamic_update_slice_in_dim(through, own_y, start + band * columns, axis=2)


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
      cotangent: (L, batch, n).
    """
    node, depth, columns = plan.nodes[k], plan.depth(k), plan.columns[k]
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
    return total if own.band is None else total + _band_gradient(cotangent, own.band, depth, columns)


def _band_gradient(cotangent: jax.Array, band: jax.Array, depth: int, columns: int) -> jax.Array:
    """``lambda . S`` of the kept influences between layers, as a gradient per source layer, (L, columns).

    Args:
      cotangent: (L, batch, n).
      band: (L, batch, n, band * columns).
    """
    found = jnp.einsum("lbn,lbnp->lp", cotangent, band)
    width = band.shape[-1] // columns
    source = jnp.arange(depth)[:, None] + jnp.arange(width)[None]  # the source layer, plus the width
    total = jnp.zeros((width + depth, columns), band.dtype)
    return total.at[source].add(found.reshape(depth, width, columns))[width:]
