"""All traces, from a segment's start to its end.

    S^{v,k}_end = sum over p of  dh^v_end/dh^p_start . S^{p,k}_start  +  dh^v_end/dtheta^k inside the segment

A node's own local traces have one row per slot of a unit, found from ones on that slot of the last carry; dense rows
and influences across nodes have one per carry number, found from every unit vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax import low_rank
from deepeprop_jax.lattice import Traces
from deepeprop_jax.lifted import Lifted, broadcast
from deepeprop_jax.node import to_grid
from deepeprop_jax.node_segment import Back
from deepeprop_jax.plan import Plan
from deepeprop_jax.real import RealView
from deepeprop_jax.segment import Flow, Segment, kept_by, vector
from deepeprop_jax.slots import advance_slot, over_leaf, stack_slots
from deepeprop_jax.through_time import Leaves
from deepeprop_jax.trace import Block, advance, push


def update(segment: Segment, traces: Traces) -> Traces:
    """All traces, from the segment's start to its end."""
    plan = segment.plan
    new: Traces = {}
    for v, node in enumerate(plan.nodes):
        own = plan.name(v, v)
        if own in traces:
            rows = _slot_rows(segment, v) if any(block.kind == "local" for block in plan.own[v]) else []
            new[own] = tuple(
                _own_local(segment, block, trace, rows) if block.kind == "local" else trace
                for block, trace in zip(plan.own[v], traces[own], strict=True)
            )
        layout = plan.low_rank[v]
        if layout is not None:
            new[plan.low_rank_name(v)] = _own_low_rank(segment, v, layout, traces[plan.low_rank_name(v)])
        dense = [b for b in plan.own[v] if b.kind == "dense"] if own in traces else []
        sources = [k for k in range(v) if plan.name(v, k) in traces]
        if not dense and not sources:
            continue
        n = node.carry.size
        flow = Flow(segment, [], (v, _unit_vectors(node.carry)), rows=n)
        if dense:
            back = flow.through(v, kept_by(plan, v))
            influence = _influence(segment, flow, v, v, dense[0].leaves, traces, back)
            new[own] = tuple(
                influence if block.kind == "dense" else trace
                for block, trace in zip(plan.own[v], new[own], strict=True)
            )
        for k in sources:
            back = flow.through(k, kept_by(plan, k))
            new[plan.name(v, k)] = _influence(segment, flow, v, k, plan.trained[k], traces, back)
    return new


def _unit_vectors(view: RealView) -> Leaves:
    eye = jnp.eye(view.size)
    parts = view.unflatten(eye)
    return [Lifted(part.astype(dtype), "r") for part, dtype in zip(parts, view.dtypes, strict=True)]


def _influence(
    segment: Segment, flow: Flow, v: int, k: int, leaves: tuple[int, ...], traces: Traces, back: Back | None
) -> jax.Array:
    """Dense rows at the segment's end, (batch, n_v, columns): what was carried in, and what is new."""
    plan = segment.plan
    node, sizes, kept = plan.nodes[k], flow.sizes, kept_by(plan, k)
    lead = (sizes["b"], sizes["r"])
    columns = sum(node.params.sizes[i] for i in leaves)
    if back is None:
        total = jnp.zeros((*lead, columns), plan.dtype)
    else:
        inside = segment.nodes[k].parameters(back, "rb", sizes)
        total = jnp.concatenate([_rows(inside[i], node.params.sizes[i], sizes, plan.dtype) for i in leaves], axis=-1)
    for p in sorted(kept):
        name, layout = plan.name(p, k), plan.low_rank[k] if p == k else None
        through = flow.through(p, kept) if p <= v else None
        if (name not in traces and layout is None) or through is None or not through.start:
            continue
        own_units = p == v and not plan.full_jacobian(v)
        if own_units:
            matrix = recurrence(segment, v)
        else:
            matrix = jnp.swapaxes(vector(segment, p, through.start, "rb", sizes), 0, 1)  # (batch, rows, n_p)
        times = advance if own_units else push
        if p != k:
            every = Block("dense", leaves, None, plan.nodes[p].carry.size, columns)
            total = total + times(plan.nodes[p], every, matrix, traces[name])
            continue
        parts = {i: jnp.zeros((*lead, node.params.sizes[i]), plan.dtype) for i in leaves}
        for block, rows in _own_rows(plan, k, traces):
            if not set(block.leaves) <= set(leaves):
                continue
            part, start = times(node, block, matrix, rows), 0
            for i in block.leaves:
                parts[i] = part[..., start : start + node.params.sizes[i]]
                start += node.params.sizes[i]
        total = total + jnp.concatenate([parts[i] for i in leaves], axis=-1)
    return total


def _own_rows(plan: Plan, k: int, traces: Traces) -> list[tuple[Block, jax.Array]]:
    """Node k's own trace, (batch, rows, columns) per block."""
    pairs = zip(plan.own[k], traces.get(plan.name(k, k), ()), strict=True)
    found = [(block, stack_slots(trace) if block.kind == "local" else trace) for block, trace in pairs]
    layout = plan.low_rank[k]
    if layout is not None:
        whole = low_rank.multiplied_out(layout, traces[plan.low_rank_name(k)])
        found += zip(layout.blocks, whole, strict=True)
    return found


def _rows(x: Lifted | None, size: int, sizes: dict[str, int], dtype: Any) -> jax.Array:
    """(batch, rows, size)."""
    if x is None:
        return jnp.zeros((sizes["b"], sizes["r"], size), dtype)
    return jnp.swapaxes(broadcast(x.flat(), "rb", sizes), 0, 1).astype(dtype)


class SlotRow(NamedTuple):
    """What ones on one slot of the last carry find at the segment's start, and of every parameter leaf.

    Attributes:
      start: (batch, K, units) one row of the product of all D.
      params: per real parameter leaf, its cotangent with axis b; None for zero.
    """

    start: jax.Array
    params: Leaves


def _slot_rows(segment: Segment, v: int) -> list[SlotRow]:
    part, node = segment.nodes[v], segment.plan.nodes[v]
    rows = []
    for slot in range(node.units.slots):
        back = part.back_slot(slot)
        start = vector(segment, v, back.start, "b", segment.sizes)
        rows.append(SlotRow(to_grid(start, node.units), part.parameters(back, "b", segment.sizes)))
    return rows


def _own_local(segment: Segment, block: Block, trace: list[jax.Array], rows: list[SlotRow]) -> list[jax.Array]:
    """S_end = (product of D) S_start + what each step adds: per slot of a unit one row (batch, *leaf)."""
    (leaf,) = block.leaves
    new = []
    for row in rows:
        inside = row.params[leaf]
        added = None if inside is None else broadcast(inside, "b", segment.sizes).astype(segment.plan.dtype)
        new.append(advance_slot(over_leaf(row.start, block, trace[0].shape[1:]), trace, added))
    return new


def _own_low_rank(segment: Segment, v: int, layout: low_rank.Layout, trace: low_rank.LowRank) -> low_rank.LowRank:
    """``_own_local`` of all weights that are held as one product of low rank."""
    part, plan, sizes = segment.nodes[v], segment.plan, segment.sizes

    def joined(values: Sequence[Lifted | None], widths: Sequence[int]) -> jax.Array:
        """(batch, C, all widths)."""
        zeros = [Lifted(jnp.zeros(width)) for width in widths]
        full = [broadcast(zero if x is None else x, "cb", sizes) for x, zero in zip(values, zeros, strict=True)]
        return jnp.swapaxes(jnp.concatenate([x.astype(plan.dtype) for x in full], axis=-1), 0, 1)

    deltas = []
    for slot in range(layout.slots):
        values = part.linear_values(part.program.to_params, part.back_slot(slot).steps)
        deltas.append(joined([values[i] for i in layout.deltas], layout.row_widths))
    factors = joined([part.read(z) for z in layout.factors], layout.column_widths)
    return low_rank.advance(layout, trace, recurrence(segment, v), jnp.concatenate(deltas, axis=-1), factors)


def recurrence(segment: Segment, v: int) -> jax.Array:
    """(batch, K, K, units) the product of all D of a segment."""
    part, units = segment.nodes[v], segment.plan.nodes[v].units
    starts = [part.back_slot(slot).start for slot in range(units.slots)]
    return jnp.stack([to_grid(vector(segment, v, start, "b", segment.sizes), units) for start in starts], axis=1)
