"""The traces of a ``stack(cell, depth=L)`` one step on, layer by layer upward, under one ``lax.scan``: see upward.py.

The influences of all source layers stand one behind the other. Layer l keeps a trace of the min(l, ``band``) source
layers below it. All kept pairs (l, k) lie one after the other, by l and then by k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import PyTree
from deepeprop_jax.segments.depth import DeepSegment
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.partials import (
    KeptInfluence,
    Partials,
    Wanted,
    cross_influence,
    own_influence,
    own_output,
    partials,
)
from deepeprop_jax.traces.depth import DeepTraces, layer_of, place_of, with_layer
from deepeprop_jax.traces.output_influence import Influence
from deepeprop_jax.traces.plan import Plan


def wanted_of(plan: Plan, v: int) -> Wanted:
    """Which partial derivatives of node v the traces need."""
    sources = bool(plan.sources(v))
    passed_on = {k for p, k in plan.transmitted if p == v}
    # Inside a stack(cell, depth=L) influences also climb from layer to layer.
    has_depth = plan.graph.nodes[v].depth is not None
    climbing = has_depth and (sources or v in passed_on or plan.bands[v] > 0)
    return Wanted(
        own=plan.own[v],
        trained=plan.trained[v],
        full=plan.full_jacobian(v),
        input=sources or climbing,
        output=bool(passed_on) or climbing,
        own_output=v in passed_on or plan.bands[v] > 0,
    )


def update_layers(
    plan: Plan,
    v: int,
    part: DeepSegment,
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
      All these traces one step on, and Y^{v,k} at the top layer for the sources that are passed on (v itself included).
    """
    node, depth, columns, band = plan.nodes[v], plan.depth(v), plan.columns[v], plan.bands[v]
    wanted = wanted_of(plan, v)
    batch = part.sizes["b"]
    pairs = {k: plan.pairs[v, k] for k in cross_tm1}
    padded = {k: _pad_layers(trace, depth) for k, trace in cross_tm1.items()}
    inside = {k: u.multiplied_out(batch, node.input.size, plan.dtype) for k, u in from_below.items()}
    if wanted.own_output:
        inside[v] = jnp.zeros((depth, batch, node.input.size, columns), plan.dtype)
    inside = vary_like(inside, part.params, part.carry_end, part.outputs)  # there may be no carry

    def body(
        passed: tuple[dict[int, jax.Array], jax.Array | None], layer: NodeSegment, held: PyTree
    ) -> tuple[tuple[dict[int, jax.Array], jax.Array | None], PyTree]:
        below, band_t = passed
        index, layer_own, layer_cross = held
        partial = partials(layer, wanted, plan.dtype)
        own_t = own_influence(node, partial, wanted.own, layer_own)
        above, cross_t = {}, {}
        for k, influence in below.items():
            if k == v:
                continue
            past = KeptInfluence(layer_cross[k], _within_hops(plan, v, k, index)) if k in pairs else None
            arriving = _influence(plan, k, influence)
            cross_t[k], output = cross_influence(node, partial, past, arriving, wanted.output)
            above[k] = influence if output is None else output.multiplied_out(batch, node.output.size, plan.dtype)
        if wanted.own_output:
            own_y = own_output(node, partial, wanted, layer_own, own_t)
            own_y = own_y.multiplied_out(batch, node.output.size, plan.dtype)
            above[v], band_t = _own_upward(node, partial, wanted, below[v], band_t, own_y, index, band)
        return (above, band_t), (own_t, {k: cross_t[k] for k in padded})

    held = (jnp.arange(depth), own_tm1.own, padded)
    (above, band_t), (own_t, cross_t) = part.over_layers(body, (inside, own_tm1.band), held, upward=True)
    if v in above:
        above[v] = jnp.moveaxis(above[v], 0, 2).reshape(batch, node.output.size, depth * columns)
    above = {k: _influence(plan, k, y) for k, y in above.items() if (v, k) in plan.transmitted}
    return DeepTraces(own_t, band_t), {k: trace[: pairs[k].layers] for k, trace in cross_t.items()}, above


def _influence(plan: Plan, k: int, columns: jax.Array) -> Influence:
    return Influence(plan.nodes[k], plan.trained[k], whole=columns)


Passed = tuple[jax.Array, jax.Array | None]
"""``below`` and ``band_tm1`` of ``_own_upward``, changed as far as it has come."""


def _own_upward(
    node: Node,
    partial: Partials,
    wanted: Wanted,
    below: jax.Array,
    band_tm1: jax.Array | None,
    own_y: jax.Array,
    index: jax.Array,
    band: int,
) -> Passed:
    """The influences of all layers of the node one layer up, to layer ``index``; kept ones also move right in time.

    Args:
      below: (L, batch, inputs, columns) of the layers under this one, zero for the others.
      band_tm1: (pairs, batch, n, columns).
      own_y: what this layer's output owes to its own parameters.

    Returns:
      ``below`` and ``band_tm1`` with the new ones in their place.
    """
    depth, batch = below.shape[:2]

    def up(past: KeptInfluence | None, columns_below: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        arriving = Influence(node, wanted.trained, whole=columns_below)
        trace_t, output = cross_influence(node, partial, past, arriving, True)
        return trace_t, output.multiplied_out(batch, node.output.size, below.dtype)

    def above(u: jax.Array, s: jax.Array | None) -> Passed:
        return u, s

    def too_far(u: jax.Array, s: jax.Array | None) -> Passed:
        return up(None, u)[1], s

    def kept(u: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        return up(KeptInfluence(s), u)[::-1]

    def body(
        passed: tuple[jax.Array, jax.Array | None], k: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
        below, held = passed
        u = layer_of(below, k)
        if held is None:
            y, _ = jax.lax.cond(k < index, too_far, above, u, None)
            return (with_layer(below, y, k), None), None
        place = place_of(depth, band, index, k)
        which = jnp.where(k < index, jnp.where(place.kept, 1, 2), 0)
        cases = [above, kept, too_far] if band < depth - 1 else [above, kept]
        y, s = jax.lax.switch(which, cases, u, layer_of(held, place.index))
        return (with_layer(below, y, k), with_layer(held, s, place.index)), None

    (through, band_t), _ = jax.lax.scan(body, (below, band_tm1), jnp.arange(depth))
    return with_layer(through, own_y, index), band_t


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
