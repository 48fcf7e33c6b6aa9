"""The filtered trace over the C steps of a segment; what it is: ``traces/filtered.py``.

    F_end = κ^C F_start + Σ_s κ^(C-s) Y_s

The sum is one pull: of κ^(C-s) on all outputs of the source at step s, through its g and its D, to its own trace at the
start and to its parameters. Steps that are not valid do not count, and a reset ends what was before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.segments.cotangents import vector
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.through_time import Past
from deepeprop_jax.traces import filtered
from deepeprop_jax.traces.block import over_leaf
from deepeprop_jax.traces.plan import Traces


def gradient(segment: Segment, w: int, v: int, signal: jax.Array, traces: Traces) -> jax.Array:
    """``λ^w · S^{w,v}``, (columns of v,).

    Args:
      signal: λ^w, (batch, n).
    """
    plan, part = segment.plan, segment.nodes[w]
    assert isinstance(part, NodeSegment)
    kind, view = plan.filtered[w, v], plan.nodes[w].carry
    below = []
    for number in range(len(kind.decays)):
        of_group = view.unflatten(jnp.where(kind.group == number, signal, 0))
        leaves: Leaves = [Lifted(leaf.astype(d), "b") for leaf, d in zip(of_group, view.dtypes, strict=True)]
        found = part.linear_values(part.program.to_input, leaves)
        below.append(vector(plan.nodes[w].input, plan.dtype, found, "b", segment.sizes))
    return filtered.contract(
        plan.nodes[v], plan.own[v], plan.trained[v], kind, jnp.stack(below), traces[plan.name(w, v)]
    )


def advance(segment: Segment, w: int, v: int, traces: Traces) -> jax.Array:
    """F at the segment's end, (batch, G, columns of v).

    Args:
      traces: at its start, as ``state.split_slots`` gives them.
    """
    plan, part = segment.plan, segment.nodes[v]
    assert isinstance(part, NodeSegment)
    node, kind, held = plan.nodes[v], plan.filtered[w, v], traces[plan.name(w, v)]
    blocks = zip(plan.own[v], traces.get(plan.name(v, v), ()), strict=True)
    own = {block.leaves[0]: (block, trace) for block, trace in blocks}
    rows = []
    for number, decay in enumerate(kind.decays):
        kept, whole = _powers(part, decay, plan.dtype)
        dy: Leaves = []
        for shape, dtype in zip(node.output.shapes, node.output.dtypes, strict=True):
            lead = kept.reshape(*kept.shape, *(1,) * len(shape))
            dy.append(Lifted(jnp.broadcast_to(lead, (*kept.shape, *shape)).astype(dtype), "cb"))
        back = part.back(Past.LOCAL, dy, [], 1, "carry")
        inside = part.parameters(back, "b", part.sizes)
        start = to_grid(vector(node.carry, plan.dtype, back.start, "b", part.sizes), node.units)
        columns = []
        for i in plan.trained[v]:
            total, shape = jnp.zeros((len(held), *node.params.shapes[i]), plan.dtype), node.params.shapes[i]
            if i in own:
                block, trace = own[i]
                by_entry = over_leaf(start, block, shape)  # (batch, K, *leaf)
                total = total + sum(by_entry[:, k] * row for k, row in enumerate(trace))
            found = inside[i]
            if found is not None:
                total = total + broadcast(found, "b", part.sizes).astype(plan.dtype)
            columns.append(total.reshape(len(held), -1))
        rows.append(whole[:, None] * held[:, number] + jnp.concatenate(columns, axis=1))
    return jnp.stack(rows, axis=1)


def _powers(part: NodeSegment, decay: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """κ^(valid steps behind s), (C, batch), zero before a reset and where a step is not valid; and κ^(valid steps)."""
    steps, batch = part.sizes["c"], part.sizes["b"]
    valid = jnp.ones((steps, batch), bool) if part.flags.valid is None else part.flags.valid
    base, count = jnp.asarray(decay, dtype), _from_here_on(valid, dtype)
    kept = jnp.where(valid, base ** (count - valid.astype(dtype)), 0)
    if part.flags.resets is not None:
        later = _from_here_on(part.flags.resets, dtype) - part.flags.resets.astype(dtype)
        kept = jnp.where(later > 0, 0, kept)
    return kept, base ** count[0]


def _from_here_on(flags: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """How many of the flags are true at a step and behind it."""
    return jnp.flip(jnp.cumsum(jnp.flip(flags.astype(dtype), 0), 0), 0)
