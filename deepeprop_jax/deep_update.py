"""The traces of a ``stack(cell, depth=L)``, from a segment's start to its end, layer by layer.

Unit vectors on one layer's last carry go down through all layers; of those above it they are zero, and are computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.deep_segment import DeepSegment, unit_vectors
from deepeprop_jax.depth import DeepTraces
from deepeprop_jax.lattice import Traces
from deepeprop_jax.node_segment import NodeSegment
from deepeprop_jax.plan import Plan
from deepeprop_jax.segment import Flow, Segment
from deepeprop_jax.segment_influence import influence
from deepeprop_jax.segment_own import advance_local, advance_low_rank
from deepeprop_jax.slots import split_block, stack_slots


def update(segment: Segment, v: int, part: DeepSegment, traces: Traces) -> Traces:
    """All traces of node v."""
    plan, name = segment.plan, segment.plan.name(v, v)
    new: Traces = {}
    held = traces.get(name, DeepTraces((), None))
    own, low_rank = _own(plan, v, part, held, traces)
    if low_rank is not None:
        new[plan.low_rank_name(v)] = low_rank
    dense = [block for block in plan.own[v] if block.kind == "dense" and name in traces]
    sources = [k for k in range(v) if plan.name(v, k) in traces]
    band = held.band
    if dense or band is not None or sources:
        inside, found = _influences(segment, v, part, traces, bool(dense) or band is not None, sources)
        new |= found
        if inside is not None:
            own = [_layer_itself(plan, v, b.leaves, inside) if b.kind == "dense" else s
                   for b, s in zip(plan.own[v], own, strict=True)]  # fmt: skip
            band = None if band is None else _layers_below(plan, v, inside)
    if name in traces:
        new[name] = DeepTraces(tuple(own), band)
    return new


def _own(plan: Plan, v: int, part: DeepSegment, held: DeepTraces, traces: Traces) -> tuple[list[jax.Array], Any]:
    """Local rows one segment on; dense ones as they are."""
    if not held.own and plan.low_rank_name(v) not in traces:
        return [], None
    layout = plan.low_rank[v]
    local = [block for block in plan.own[v] if block.kind == "local"]
    rows = [trace for block, trace in zip(plan.own[v], held.own, strict=True) if block.kind == "local"]
    low_rank = None if layout is None else traces[plan.low_rank_name(v)]
    if not rows and low_rank is None:
        return list(held.own), None

    def body(_: None, layer: NodeSegment, own: tuple[list[jax.Array], Any]) -> tuple[None, Any]:
        shapes = plan.nodes[v].params.shapes
        split = [split_block(b, shapes[b.leaves[0]], trace) for b, trace in zip(local, own[0], strict=True)]
        moved = [stack_slots(rows) for rows in advance_local(layer, local, split, plan.dtype)]
        compact = None if layout is None else advance_low_rank(layer, layout, own[1], plan.dtype)
        return None, (moved, compact)

    _, (moved, compact) = part.over_layers(body, None, (rows, low_rank))
    rest = iter(moved)
    own = [next(rest) if b.kind == "local" else s for b, s in zip(plan.own[v], held.own, strict=True)]
    return own, compact


def _influences(
    segment: Segment, v: int, part: DeepSegment, traces: Traces, of_itself: bool, sources: list[int]
) -> tuple[jax.Array | None, Traces]:
    """What every layer owes to all layers of v, (L, batch, n, L, columns), and to the nodes below."""
    plan, n = segment.plan, part.node.carry.size

    def layer(index: jax.Array) -> tuple[jax.Array | None, Traces]:
        flow = Flow(segment, [], (v, unit_vectors(part, index)), rows=n)
        found = {plan.name(v, k): influence(segment, flow, v, k, plan.trained[k], traces) for k in sources}
        if not of_itself:
            return None, found
        inside = influence(segment, flow, v, v, plan.trained[v], traces)
        return inside.reshape(*inside.shape[:2], part.depth, -1), found

    return lax.map(layer, jnp.arange(part.depth))


def _layer_itself(plan: Plan, v: int, leaves: tuple[int, ...], inside: jax.Array) -> jax.Array:
    """(L, batch, n, columns of ``leaves``) what each layer owes to itself."""
    view = plan.nodes[v].params
    itself = jax.vmap(lambda rows, index: lax.dynamic_index_in_dim(rows, index, axis=2, keepdims=False))
    own, start, parts = itself(inside, jnp.arange(inside.shape[0])), 0, []
    for i in plan.trained[v]:
        if i in leaves:
            parts.append(own[..., start : start + view.sizes[i]])
        start += view.sizes[i]
    return jnp.concatenate(parts, axis=-1)


def _layers_below(plan: Plan, v: int, inside: jax.Array) -> jax.Array:
    """(L, batch, n, band * columns) what each layer owes to those below it, as ``DeepTraces`` holds it."""
    band = plan.bands[v]
    padded = jnp.pad(inside, ((0, 0), (0, 0), (0, 0), (band, 0), (0, 0)))
    window = jax.vmap(lambda rows, index: lax.dynamic_slice_in_dim(rows, index, band, axis=2))
    found = window(padded, jnp.arange(inside.shape[0]))
    return found.reshape(*found.shape[:3], -1)
