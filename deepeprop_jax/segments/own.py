"""A node's own local traces, from a segment's start to its end: one row per slot of a unit.

    S_end = (product of all D) S_start + what each step adds, through the steps after it          eq. 6

A unit is one index of a carry shape; its K slots are the carry leaves of that shape. D is K x K for each unit. Through
D a cotangent never leaves its unit: so ones on a whole slot of the last carry, pulled back, give that row of every
unit's own product of all D at once, and what the steps add to that row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.segments import outer
from deepeprop_jax.segments.cotangents import vector
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.traces import low_rank
from deepeprop_jax.traces.block import Block, over_leaf
from deepeprop_jax.traces.local import advance_split


class SlotRow(NamedTuple):
    """What ones on one slot of the last carry find at the segment's start, and of every parameter leaf.

    Attributes:
      start: (batch, K, units) one row of the product of all D.
      params: per real parameter leaf, its cotangent with axis b; None for zero.
    """

    start: jax.Array
    params: Leaves


def slot_rows(part: NodeSegment, dtype: jnp.dtype) -> list[SlotRow]:
    """One ``SlotRow`` per slot: the rows of the K x K products."""
    node, rows = part.node, []
    for slot in range(node.units.slots):
        back = part.back_slot(slot)
        start = vector(node.carry, dtype, back.start, "b", part.sizes)
        rows.append(SlotRow(to_grid(start, node.units), part.parameters(back, "b", part.sizes)))
    return rows


def immediate(rows: list[SlotRow], block: Block, sizes: dict[str, int], dtype: jnp.dtype) -> jax.Array:
    """What a segment adds to a local trace of one parameter leaf, (batch, K, |leaf|); of one step, ∂F/∂θ."""
    (leaf,) = block.leaves
    found = (row.params[leaf] for row in rows)
    flat = [Lifted(jnp.zeros(block.columns)) if x is None else x.flat() for x in found]
    return jnp.stack([broadcast(x, "b", sizes).astype(dtype) for x in flat], axis=1)


def recurrence(part: NodeSegment, dtype: jnp.dtype) -> jax.Array:
    """(batch, K, K, units) the product of all D of a segment."""
    units, view = part.node.units, part.node.carry
    starts = [part.back_slot(slot).start for slot in range(units.slots)]
    return jnp.stack([to_grid(vector(view, dtype, start, "b", part.sizes), units) for start in starts], axis=1)


def advance_local(
    part: NodeSegment, blocks: Sequence[Block], traces: Sequence[list[jax.Array]], dtype: jnp.dtype
) -> list[list[jax.Array]]:
    """Own local traces, one leaf each, held as ``state.split_slots`` gives them."""
    rows = slot_rows(part, dtype) if blocks else []
    moved = []
    for block, trace in zip(blocks, traces, strict=True):
        (leaf,) = block.leaves
        new = []
        for row in rows:
            inside = row.params[leaf]
            added = None if inside is None else broadcast(inside, "b", part.sizes).astype(dtype)
            new.append(advance_split(over_leaf(row.start, block, trace[0].shape[1:]), trace, added))
        moved.append(new)
    return moved


def advance_low_rank(
    part: NodeSegment, layout: low_rank.Layout, trace: low_rank.LowRank, dtype: jnp.dtype
) -> low_rank.LowRank:
    """The trace of all weights that are held as one product of low rank, one segment on."""
    every = [part.linear_values(part.program.to_params, part.back_slot(slot).steps) for slot in range(layout.slots)]
    deltas = jnp.concatenate([outer.deltas(layout, values, part.sizes, dtype) for values in every], axis=-1)
    factors = outer.factors(layout, [part.read(z) for z in layout.factors], part.sizes, dtype)
    return low_rank.advance(layout, trace, recurrence(part, dtype), deltas, factors)


def shown_now(part: NodeSegment, dtype: jnp.dtype) -> jax.Array:
    """Of a segment of one step, what of each slot of the source's trace after it is shown: (batch, K, units)."""
    ones = jnp.ones((part.sizes["c"], part.sizes["b"]), dtype)
    dh_t, _, _ = part.through_output(on_all_outputs(part.node, ones), part.sizes)
    flat = vector(part.node.carry, dtype, dh_t, "cb", part.sizes)[0]
    return to_grid(flat, part.node.units)


def on_all_outputs(node: Node, values: jax.Array) -> Leaves:
    """(C, batch) as the cotangent of every output."""
    dy: Leaves = []
    for shape, dtype in zip(node.output.shapes, node.output.dtypes, strict=True):
        wide = jnp.broadcast_to(values.reshape(*values.shape, *(1,) * len(shape)), (*values.shape, *shape))
        dy.append(Lifted(wide.astype(dtype), "cb"))
    return dy
