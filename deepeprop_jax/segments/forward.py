"""The loop that runs a node forward through the steps of a segment: of its program, what depends on the carry."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.analysis.node import VjpProgram
from deepeprop_jax.jaxpr.batched import Lifted, Values, broadcast
from deepeprop_jax.jaxpr.real_leaves import Parts, select_examples
from deepeprop_jax.segments.through_time import Flags, last_where_cut_off


class Run(NamedTuple):
    """What the loop leaves behind.

    Attributes:
      carry_end: (batch, ...) the carry after the segment.
      carry_tm1: (C, batch, ...) the carry that enters each step.
      carry_t: (C, batch, ...) what leaves it, held steps included; None where it is the next step's ``carry_tm1``.
      stored: (C, batch, ...) values of ``VjpProgram.stored``.
    """

    carry_end: Parts
    carry_tm1: Parts
    carry_t: Parts | None
    stored: list[jax.Array]

    def new_carry(self) -> Parts:
        """``carry_t``, in full."""
        if self.carry_t is not None:
            return self.carry_t
        return jax.tree.map(lambda old, end: jnp.concatenate([old[1:], end[None]]), self.carry_tm1, self.carry_end)


def with_inputs(program: VjpProgram, values: Values, inputs: Parts) -> Values:
    """Values at every step of a segment, from those of the parameters alone and the inputs (C, batch, ...)."""
    known = dict(values.known)
    known |= {v: Lifted(a, "cb") for v, a in zip(program.input, inputs.real, strict=True)}
    known |= {v: Lifted(a, "cb") for v, a in zip(program.input_other, inputs.other, strict=True)}
    return Values(program.program.equations, known)


def run_forward(program: VjpProgram, values: Values, start: Parts, initial: Parts, inputs: Parts, flags: Flags) -> Run:
    """Run a node through a segment.

    Args:
      program: of the node.
      values: from ``with_inputs``; what does not depend on the carry is computed there, for all steps at once.
      start: (batch, ...) its carry before the segment.
      initial: (batch, ...) what a reset returns to.
      inputs: (C, batch, ...).
      flags: (C, batch).
    """
    steps, examples = leading_sizes(inputs)
    before = dict(zip(program.before_loop, values.get(program.before_loop), strict=True))
    moving = {v: x.value for v, x in before.items() if "c" in x.axes}
    fixed = {v: x for v, x in values.known.items() if "c" not in x.axes}

    def body(carry: Parts, slices: tuple[list[jax.Array], Flags]) -> tuple[Parts, Any]:
        arrays, now = slices
        if now.resets is not None:
            carry = select_examples(now.resets, initial, carry)
        known = fixed | {v: Lifted(a, "b") for v, a in zip(moving, arrays, strict=True)}
        known |= {v: Lifted(a, "b") for v, a in zip(program.carry_tm1, carry.real, strict=True)}
        known |= {v: Lifted(a, "b") for v, a in zip(program.carry_other, carry.other, strict=True)}
        now_values = Values(program.loop, known)
        batch = {"b": examples}
        new = Parts(
            [broadcast(x, "b", batch) for x in now_values.get(program.carry_t)],
            [broadcast(x, "b", batch) for x in now_values.get(program.carry_t_other)],
        )
        stored = [broadcast(x, "b", batch) for x in now_values.get(program.stored)]
        held = new
        if now.valid is not None:
            held = select_examples(now.valid, new, carry)
        plain = now.resets is None and now.valid is None
        return held, (carry, None if plain else new, stored)

    end, (carry_tm1, carry_t, stored) = lax.scan(body, start, (list(moving.values()), flags), steps)
    return Run(end, carry_tm1, carry_t, stored)


def without_cut_off_steps(resets: jax.Array, run: Run, inputs: Parts) -> tuple[Run, Parts]:
    """See ``through_time.last_where_cut_off``."""
    steps = (run.carry_tm1, run.new_carry(), run.stored, inputs)
    carry_tm1, carry_t, stored, inputs = last_where_cut_off(resets, steps)
    return Run(run.carry_end, carry_tm1, carry_t, stored), inputs


def leading_sizes(inputs: Parts) -> tuple[int, int]:
    """C and the batch size, from any leaf (C, batch, ...)."""
    steps, examples = (inputs.real + inputs.other)[0].shape[:2]
    return steps, examples
