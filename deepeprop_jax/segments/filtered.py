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
from deepeprop_jax.segments.own import on_all_outputs
from deepeprop_jax.segments.through_time import Past
from deepeprop_jax.traces import filtered
from deepeprop_jax.traces.plan import Traces
from deepeprop_jax.traces.state import split_slots


def gradient(segment: Segment, w: int, v: int, signal: jax.Array, traces: Traces, split: bool) -> dict[int, jax.Array]:
    """``λ^w · S^{w,v}`` per parameter leaf of v, flat.

    Args:
      signal: λ^w, (batch, n).
      split: whether F stands as ``state.split_slots`` gives it, or as in the state.
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
    held = (traces if split else split_slots(plan, traces))[plan.name(w, v)]
    return filtered.contract(plan.nodes[v], kind, jnp.stack(below), held)


def advance(segment: Segment, w: int, v: int, traces: Traces) -> tuple[list[jax.Array], ...]:
    """F at the segment's end.

    Args:
      traces: at its start, as ``state.split_slots`` gives them.
    """
    plan, part = segment.plan, segment.nodes[v]
    assert isinstance(part, NodeSegment)
    node, kind, sizes = plan.nodes[v], plan.filtered[w, v], part.sizes
    inside, shown, decays = [], [], []
    for decay in kind.decays:
        kept, whole = _powers(part, decay, plan.dtype)
        back = part.back(Past.LOCAL, on_all_outputs(node, kept), [], 1, "carry")
        inside.append(part.parameters(back, "b", sizes))
        start = vector(node.carry, plan.dtype, back.start, "b", sizes) if node.recurrent else jnp.zeros((0, 0))
        shown.append(to_grid(start, node.units))
        decays.append(whole)
    new = []
    rows = traces.get(plan.name(v, v), [[] for _ in kind.blocks])
    for block, own, trace in zip(kind.blocks, rows, traces[plan.name(w, v)], strict=True):
        found = [params[block.leaves[0]] for params in inside]
        added = [None if x is None else broadcast(x, "b", sizes).astype(plan.dtype) for x in found]
        new.append(filtered.moved(block, decays, shown, own, added, trace))
    return tuple(new)


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
