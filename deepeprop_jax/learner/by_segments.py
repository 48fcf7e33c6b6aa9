"""Loss and gradient of a sequence: its segments, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.learner.sequence import Ended, Sequence, Stream, Sums
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments import joint, upward
from deepeprop_jax.segments.advance import advance_traces
from deepeprop_jax.segments.gradient import segment_gradient
from deepeprop_jax.segments.network import Segment, prepare
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import join_slots, select_traces, split_slots, without_examples

_ROOM = 2**27
"""Bytes that the cotangents of all dense rows may take inside a segment, roughly."""


class Length(NamedTuple):
    """Steps per segment, and why."""

    steps: int
    reason: str


def choose_length(plan: Plan, batch: int, steps: int | None = None) -> Length:
    """How long segments are.

    A segment costs one move of every trace, so a long one is cheap in time; it holds its own activations, and, for
    traces with dense rows, those times the rows. A length that divides the sequence saves compiling a shorter last one.

    Args:
      steps: length of the sequence, where it is known.
    """
    dense = {v for v, own in enumerate(plan.own) if plan.bands[v] or any(block.kind is Rows.DENSE for block in own)}
    across = {v for v, k in plan.pairs if (v, k) not in plan.filtered}
    rows = max((plan.nodes[v].carry.size for v in dense | across), default=0)
    longest, reason = 64, "traces of local rows move once a segment, whose activations fit the cache"
    if plan.projection is not None:
        longest, reason = 32, "a carry is projected once a segment, which costs a pass over R numbers per parameter"
    if rows:
        widest = max(node.carry.size + node.input.size for node in plan.nodes)
        layers = max(plan.depth(v) for v in range(len(plan.nodes)))
        room = _ROOM // (batch * layers * rows * widest * np.dtype(plan.dtype).itemsize)
        longest = int(np.clip(min(2 * rows, room), 8, 128))
        reason = f"a trace with dense rows moves once a segment, at {rows} multiply-adds a number"
    fitting = [length for length in range(longest // 2, longest + 1) if steps and length and steps % length == 0]
    return Length(max(fitting, default=longest), reason)


def by_segments(params: PyTree, start: Stream, sequence: Sequence, length: int, exact: bool) -> Ended:
    """Segments of ``length`` steps, the last one shorter; in some plans single steps with influences going up."""
    plan, inputs = sequence.plan, sequence.inputs
    ready = prepare(plan, params)

    def run(sums: Sums, inputs: tuple[PyTree, PyTree, Flags]) -> tuple[Sums, PyTree]:
        (carry, traces), (xs, targets, flags) = sums.stream, inputs
        part = Segment(ready, carry, sequence.initial_carry, xs, flags)
        (losses, aux), dy = sequence.losses_and_dy(part.outputs, targets, flags.valid)
        if flags.resets is not None:  # by where, so that nothing of what a trace held can spread
            traces = without_examples(plan, flags.resets[0], traces)
        given = sequence.given(dy, targets, flags.valid)
        found = segment_gradient(part, traces, dy, given, exact, split=not up)
        if up:
            moved = upward.update(part, traces)
            moved = moved if flags.valid is None else select_traces(flags.valid[0], moved, traces)
        else:
            if flags.resets is not None:
                traces = without_examples(plan, flags.resets.any(axis=0), traces)
            moved = advance_traces(part.after_resets(), traces)
        return sums.plus(Stream(part.carry_end, moved), losses.sum(), found), aux

    def cut_out(loop: tuple[Sums, jax.Array], _: None) -> tuple[tuple[Sums, jax.Array], PyTree]:
        """A segment where it is needed: XLA would copy a sequence that is reshaped or shortened before."""
        sums, start = loop
        sums, aux = run(sums, jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, length), inputs))
        return (sums, start + length), aux

    steps, batch = jax.tree.leaves(inputs[0])[0].shape[:2]
    up = length == 1 and not exact and upward.applies(plan)
    together = not up and joint.applies(plan, length, batch)
    traces = start.traces if up else split_slots(plan, start.traces)
    traces = joint.pack(plan, traces) if together else joint.unpack(plan, traces)
    sums = sequence.begin(Stream(start.carry, vary_like(traces, start.carry)))
    whole, auxes = steps // length, []
    if whole == 1:
        sums, aux = run(sums, jax.tree.map(lambda leaf: leaf[:length], inputs))
        auxes.append(aux)
    elif whole:
        (sums, _), aux = lax.scan(cut_out, (sums, jnp.zeros((), int)), None, whole)
        auxes.append(jax.tree.map(lambda leaf: leaf.reshape(whole * length, *leaf.shape[2:]), aux))
    if steps % length:
        sums, aux = run(sums, jax.tree.map(lambda leaf: leaf[whole * length :], inputs))
        auxes.append(aux)
    aux = auxes[0] if len(auxes) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *auxes)
    traces = sums.stream.traces if up else join_slots(plan, joint.unpack(plan, sums.stream.traces))
    end = Stream(sums.stream.carry, traces)
    return sequence.ended(sums._replace(stream=end), aux)
