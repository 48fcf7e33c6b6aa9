"""What a node's own trace gives to rows of a carry, as one array."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.traces import local, low_rank
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.kinds import advance, push
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import Traces


def own_columns(
    plan: Plan, k: int, leaves: tuple[int, ...], matrix: jax.Array, traces: Traces, own_units: bool = False
) -> jax.Array:
    """``M S^{k,k}``, (batch, rows, columns of ``leaves``).

    Args:
      matrix: M, (batch, rows, n); with ``own_units`` the unit-local blocks of one, (batch, K, K, units), and the leaves
        are those with dense rows.
    """
    node = plan.nodes[k]
    parts: dict[int, jax.Array] = {}
    for block, rows in _own_rows(plan, k, traces):
        if not set(block.leaves) <= set(leaves):
            continue
        part = (advance if own_units else push)(node, block, matrix, rows)
        start = 0
        for i in block.leaves:
            parts[i] = part[..., start : start + node.params.sizes[i]]
            start += node.params.sizes[i]
    lead = (matrix.shape[0], node.carry.size if own_units else matrix.shape[1])
    zeros = {i: jnp.zeros((*lead, node.params.sizes[i]), plan.dtype) for i in leaves}
    return jnp.concatenate([parts.get(i, zeros[i]) for i in leaves], axis=-1)


def _own_rows(plan: Plan, k: int, traces: Traces) -> list[tuple[Block, jax.Array]]:
    """Node k's own trace, (batch, rows, columns) per block."""
    pairs = zip(plan.own[k], traces.get(plan.name(k, k), ()), strict=True)
    found = [(block, local.join(trace) if block.kind is Rows.LOCAL else trace) for block, trace in pairs]
    layout = plan.low_rank[k]
    if layout is not None:
        whole = low_rank.multiplied_out(layout, traces[plan.low_rank_name(k)])
        found += zip(layout.blocks, whole, strict=True)
    return found
