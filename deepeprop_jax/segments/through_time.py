"""The two loops over the steps of a segment: a node forward, and cotangents of its carry back."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import VjpProgram
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, Values, add, broadcast, elementwise, scan, scan_back, union
from deepeprop_jax.jaxpr.mesh_axes import vary, varying_axes
from deepeprop_jax.jaxpr.real_leaves import Parts, PyTree, float32_or_wider, select_examples


class Flags(NamedTuple):
    """(C, batch) booleans, None where all are false (resets) or true (valid)."""

    resets: jax.Array | None
    valid: jax.Array | None


def last_where_cut_off(resets: jax.Array, values: PyTree) -> PyTree:
    """(C, batch, ...) values, with those of the last step in place of all that lie before a later reset.

    Nothing of a step before a reset reaches what follows it: its cotangents are zeros. Of a carry that is not finite
    they would still be multiplied with derivatives that are not finite.

    Args:
      resets: (C, batch).
      values: a pytree.
    """
    from_here_on = jax.lax.cummax(resets.astype(jnp.int32), axis=0, reverse=True)
    later = jnp.pad(from_here_on[1:], ((0, 1), (0, 0))) > 0

    def choose(x: jax.Array) -> jax.Array:
        return jnp.where(later.reshape(*later.shape, *(1,) * (x.ndim - 2)), x[-1:], x)

    return jax.tree.map(choose, values)


# --- forward ---------------------------------------------------------------------------------------------------------


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

    def body(carry: Parts, slices: tuple[list[jax.Array], Flags]) -> tuple[Parts, PyTree]:
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

    end, (carry_tm1, carry_t, stored) = scan(body, start, (list(moving.values()), flags), steps)
    return Run(end, carry_tm1, carry_t, stored)


def without_cut_off_steps(resets: jax.Array, run: Run, inputs: Parts) -> tuple[Run, Parts]:
    """See ``last_where_cut_off``."""
    steps = (run.carry_tm1, run.new_carry(), run.stored, inputs)
    carry_tm1, carry_t, stored, inputs = last_where_cut_off(resets, steps)
    return Run(run.carry_end, carry_tm1, carry_t, stored), inputs


def leading_sizes(inputs: Parts) -> tuple[int, int]:
    """C and the batch size, from any leaf (C, batch, ...)."""
    steps, examples = (inputs.real + inputs.other)[0].shape[:2]
    return steps, examples


# --- back ------------------------------------------------------------------------------------------------------------


class Past(enum.Enum):
    """How a carry's cotangent goes one step back."""

    FULL = "full"
    """Through dF/dh."""
    LOCAL = "local"
    """Through its unit-local blocks D."""
    NONE = "none"
    """Not at all: only what the output owes to its own step."""


class Entering(NamedTuple):
    """Cotangents that enter the loop.

    Attributes:
      now: of the new carry at every step.
      past: of the old carry at every step, where the output reads it.
      end: of the last carry.
    """

    now: Leaves
    past: Leaves
    end: Leaves


class Carry(NamedTuple):
    """Shape and dtype of each real leaf of a carry, of one example."""

    shapes: list[tuple[int, ...]]
    dtypes: list[np.dtype]


def through_time(
    pull: Callable[[Leaves, PyTree], Leaves],
    table: PyTree,
    reach: set[tuple[int, int]],
    flows: list[Entering],
    flags: Flags,
    carry: Carry,
    sizes: dict[str, int],
) -> list[tuple[Leaves, Leaves]]:
    """``lambda_{t-1} = (dh_t/dh_{t-1})^T (lambda_t + now_t) + past_t``, from the last step to the first.

    Args:
      pull: ``(cotangent of the new carry, values of the step) -> cotangent of the old carry``.
      table: values that ``pull`` reads, a pytree of ``Lifted``.
      reach: (r, s) where leaf r's cotangent reaches leaf s of the step before; the others stay structural zeros.
      flows: several go through one loop.
      flags: a step that is not valid hands its cotangent on as it is; before a reset it ends.

    Returns:
      Per flow the cotangent of the first old carry, and of every step's new carry.
    """
    leaves = range(len(carry.shapes))
    wide_flags = tuple(None if f is None else Lifted(f, "cb") for f in flags)
    read = _lifted((table, wide_flags))
    alive: list[list[int]] = []
    axes: list[str] = []
    dtypes: list[list[np.dtype]] = []
    for flow in flows:
        given = [x for group in flow for x in group if x is not None]
        found = {i for i in leaves if any(group[i] is not None for group in flow)}
        for _ in leaves:
            found |= {s for r, s in reach if r in found}
        alive.append(sorted(found))
        axes.append(union(*(x.axes for x in (*given, *read))).replace("c", ""))
        dtypes.append([float32_or_wider(*(x.value.dtype for x in given), dtype) for dtype in carry.dtypes])

    varying = varying_axes((flows, table, flags))

    def whole(f: int, i: int, x: Lifted | None) -> jax.Array:
        if x is None:
            return vary(jnp.zeros((*(sizes[a] for a in axes[f]), *carry.shapes[i]), dtypes[f][i]), varying)
        return vary(broadcast(x, axes[f], sizes).astype(dtypes[f][i]), varying)

    def body(carried: list[list[jax.Array]], step: PyTree) -> tuple[list[list[jax.Array]], list[list[jax.Array]]]:
        given, now_table, (resets, valid) = step
        before, totals = [], []
        for f, (arrays, (now, past)) in enumerate(zip(carried, given, strict=True)):
            after = {i: Lifted(x, axes[f]) for i, x in zip(alive[f], arrays, strict=True)}
            total = {i: masked(valid, add(x, now[i])) for i, x in after.items()}
            pulled = pull([total.get(i) for i in leaves], now_table)
            new = {i: add(pulled[i], past[i]) for i in alive[f]}
            if valid is not None:
                new = {i: add(x, masked(_not(valid), after[i])) for i, x in new.items()}
            if resets is not None:
                new = {i: masked(_not(resets), x) for i, x in new.items()}
            before.append([whole(f, i, x) for i, x in new.items()])
            totals.append([whole(f, i, x) for i, x in total.items()])
        return before, totals

    start = [[whole(f, i, flow.end[i]) for i in alive[f]] for f, flow in enumerate(flows)]
    streams = [(flow.now, flow.past) for flow in flows]
    firsts, steps = scan_back(body, start, (streams, table, wide_flags), sizes["c"])

    def by_leaf(f: int, arrays: list[jax.Array], lead: str) -> Leaves:
        found = dict(zip(alive[f], arrays, strict=True))
        return [Lifted(found[i], lead) if i in found else None for i in leaves]

    return [(by_leaf(f, firsts[f], axes[f]), by_leaf(f, steps[f], "c" + axes[f])) for f in range(len(flows))]


def pull_local(ct: Leaves, blocks: dict[tuple[int, int], Lifted]) -> Leaves:
    """The cotangent of the old carry through D, unit by unit."""
    there = [(r, x) for r, x in enumerate(ct) if x is not None]
    return [
        add(*(elementwise(jnp.multiply, blocks[r, s], x) for r, x in there if (r, s) in blocks)) for s in range(len(ct))
    ]


def masked(flag: Lifted | None, x: Lifted | None) -> Lifted | None:
    """x where the example's flag is set, zero elsewhere; without a flag x."""
    if x is None or flag is None:
        return x
    wide = flag.map(lambda f: f.reshape(*f.shape, *(1,) * len(x.shape)))
    return elementwise(lambda f, v: jnp.where(f, v, 0), wide, x)


def _not(flag: Lifted) -> Lifted:
    return flag.map(jnp.logical_not)


def _lifted(tree: PyTree) -> list[Lifted]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Lifted))
    return [x for x in leaves if isinstance(x, Lifted)]
