"""All traces, from a segment's start to its end.

A node's own local traces have one row per slot of a unit (own.py); dense rows and influences across nodes have one per
carry number (influence.py). A node with depth has both, for every layer: unit vectors on one layer's last carry go down
through all layers; of those above it they are zero, and are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.real_leaves import PyTree
from deepeprop_jax.segments import filtered, joint, projected
from deepeprop_jax.segments.cotangents import unit_vectors
from deepeprop_jax.segments.depth import DeepSegment, layer_end
from deepeprop_jax.segments.influence import influence, influence_of_layers
from deepeprop_jax.segments.kept import groups
from deepeprop_jax.segments.network import Flow, Segment
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.own import advance_local, advance_low_rank
from deepeprop_jax.traces import local
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.depth import DeepTraces, columns_of, put_pairs
from deepeprop_jax.traces.low_rank import LowRank
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.projected import NAME


def advance_traces(segment: Segment, traces: Traces) -> Traces:
    """All traces, from the segment's start to its end."""
    plan = segment.plan
    new: Traces = joint.update(segment, traces)
    for v, (node, part) in enumerate(zip(plan.nodes, segment.nodes, strict=True)):
        if isinstance(part, DeepSegment):
            new |= _advance_deep(segment, v, part, traces)
            continue
        name, layout = plan.name(v, v), plan.low_rank[v]
        own = list(traces.get(name, ()))
        blocks = plan.own[v] if own else ()
        local = [i for i, block in enumerate(blocks) if block.kind is Rows.LOCAL]
        moved = advance_local(part, [blocks[i] for i in local], [own[i] for i in local], plan.dtype)
        for i, trace in zip(local, moved, strict=True):
            own[i] = trace
        if layout is not None:
            new[plan.low_rank_name(v)] = advance_low_rank(part, layout, traces[plan.low_rank_name(v)], plan.dtype)
        dense = [i for i, block in enumerate(blocks) if block.kind is Rows.DENSE]
        sources = [k for k in range(v) if plan.name(v, k) in traces and (v, k) not in plan.filtered]
        new |= {plan.name(v, k): filtered.advance(segment, v, k, traces) for k in range(v) if (v, k) in plan.filtered}
        if dense or sources:
            flow = Flow(segment, [], {v: unit_vectors(node.carry)}, rows=node.carry.size)
            for i in dense:
                own[i] = influence(segment, flow, v, v, blocks[i].leaves, traces)
            new |= {plan.name(v, k): influence(segment, flow, v, k, plan.trained[k], traces) for k in sources}
        if name in traces:
            new[name] = tuple(own)
    if plan.projection is not None:
        new[NAME] = projected.advance(segment, traces, new)
    return new


# --- nodes with depth -------------------------------------------------------------------------------------------------


def _advance_deep(segment: Segment, v: int, part: DeepSegment, traces: Traces) -> Traces:
    """All traces of node v."""
    plan, name = segment.plan, segment.plan.name(v, v)
    new: Traces = {}
    held = traces.get(name, DeepTraces((), None))
    own, low_rank = _own(plan, v, part, held, traces)
    if low_rank is not None:
        new[plan.low_rank_name(v)] = low_rank
    dense = {i: trace for i, trace in enumerate(held.own) if plan.own[v][i].kind is Rows.DENSE}
    names = {k: plan.name(v, k) for k in range(v) if plan.name(v, k) in traces}
    band = held.band
    if dense or band is not None or names:
        across = {k: traces[key] for k, key in names.items()}
        dense, band, across = _influences(segment, v, part, traces, Wide(dense, band, across))
        own = [dense.get(i, trace) for i, trace in enumerate(own)]
        new |= {names[k]: trace for k, trace in across.items()}
    if name in traces:
        new[name] = DeepTraces(tuple(own), band)
    return new


def _own(
    plan: Plan, v: int, part: DeepSegment, held: DeepTraces, traces: Traces
) -> tuple[list[jax.Array], LowRank | None]:
    """Local rows one segment on; dense ones as they are."""
    if not held.own and plan.low_rank_name(v) not in traces:
        return [], None
    layout = plan.low_rank[v]
    own_rows = [block for block in plan.own[v] if block.kind is Rows.LOCAL]
    rows = [trace for block, trace in zip(plan.own[v], held.own, strict=True) if block.kind is Rows.LOCAL]
    low_rank = None if layout is None else traces[plan.low_rank_name(v)]
    if not rows and low_rank is None:
        return list(held.own), None

    def body(_: None, layer: NodeSegment, own: PyTree) -> tuple[None, PyTree]:
        shapes = plan.nodes[v].params.shapes
        split = [local.split(b, shapes[b.leaves[0]], trace) for b, trace in zip(own_rows, own[0], strict=True)]
        moved = [local.join(rows) for rows in advance_local(layer, own_rows, split, plan.dtype)]
        compact = None if layout is None else advance_low_rank(layer, layout, own[1], plan.dtype)
        return None, (moved, compact)

    _, (moved, compact) = part.over_layers(body, None, (rows, low_rank))
    rest = iter(moved)
    own = [next(rest) if b.kind is Rows.LOCAL else s for b, s in zip(plan.own[v], held.own, strict=True)]
    return own, compact


class Wide(NamedTuple):
    """The traces of a node with depth that have a row per number of its carry.

    Attributes:
      dense: by block, (L, batch, n, columns of the block): what each layer owes to itself.
      band: (pairs, batch, n, columns): to the layers below it.
      across: by node below, (kept layers, batch, n, columns of its kept layers).
    """

    dense: dict[int, jax.Array]
    band: jax.Array | None
    across: dict[int, jax.Array]


def _influences(segment: Segment, v: int, part: DeepSegment, traces: Traces, wide: Wide) -> Wide:
    """One segment on, from the highest layer down: the traces of a layer are read by those above it, which are done by
    then, so that its new ones may lie in the place of the old."""
    plan, n, name = segment.plan, part.node.carry.size, segment.plan.name(v, v)
    own = traces.get(name, DeepTraces((), None)).own

    def layer(wide: Wide, index: jax.Array) -> tuple[Wide, None]:
        flow = Flow(segment, [], {v: layer_end(part, index)}, rows=n)
        held = traces | {plan.name(v, k): trace for k, trace in wide.across.items()}
        if name in traces:
            held |= {name: DeepTraces(tuple(wide.dense.get(i, trace) for i, trace in enumerate(own)), wide.band)}
        across = {
            k: _with_row(plan, v, k, trace, influence(segment, flow, v, k, plan.trained[k], held), index)
            for k, trace in wide.across.items()
        }
        dense, band = wide.dense, wide.band
        if dense or band is not None:
            (group,) = groups(plan, v, v)
            inside = influence_of_layers(segment, flow, v, held, group.kept, index)
            itself = lax.dynamic_index_in_dim(inside, index, keepdims=False)
            found = {i: columns_of(part.node, plan.own[v][i].leaves, itself, plan.trained[v]) for i in dense}
            dense = {i: lax.dynamic_update_index_in_dim(dense[i], columns, index, 0) for i, columns in found.items()}
            if band is not None:
                band = put_pairs(band, inside, index, plan.bands[v])
        return Wide(dense, band, across), None

    return lax.scan(layer, wide, jnp.arange(part.depth), reverse=True)[0]


def _with_row(plan: Plan, v: int, k: int, trace: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    """An influence across nodes with what layer ``index`` of v owes to k, where that is within the hops."""
    pair = plan.pairs[v, k]
    if pair.layers == plan.depth(v) and pair.mask is None:
        return lax.dynamic_update_index_in_dim(trace, row, index, 0)
    place = jnp.minimum(index, pair.layers - 1)
    if pair.mask is not None:
        inside = jnp.repeat(jnp.asarray(pair.mask)[place], plan.columns[k], total_repeat_length=pair.columns)
        row = jnp.where(inside, row, 0)
    row = jnp.where(index < pair.layers, row, lax.dynamic_index_in_dim(trace, place, keepdims=False))
    return lax.dynamic_update_index_in_dim(trace, row, place, 0)
