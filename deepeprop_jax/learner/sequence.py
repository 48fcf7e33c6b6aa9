"""Loss and gradient of a sequence: its segments, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.learner import checks
from deepeprop_jax.network.arguments import batch_size
from deepeprop_jax.network.cell import PyTree, assemble
from deepeprop_jax.segments import joint, upward
from deepeprop_jax.segments.advance import advance_traces
from deepeprop_jax.segments.gradient import segment_gradient
from deepeprop_jax.segments.network import Segment, prepare
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.state import join_slots, select_traces, split_slots, without_examples


class Stream(NamedTuple):
    """What goes from one segment to the next."""

    carry: PyTree
    traces: Traces


class Sequence(NamedTuple):
    """What a sequence is made of.

    Attributes:
      loss_fn: ``(y_t, target_t) -> loss`` or ``(loss, aux)``, the loss a scalar or one per example.
      has_aux: which of the two.
      initial_carry: what an example returns to on a reset.
      xs, targets: (time, ...).
      flags: (time, batch).
      loss_dtype: of the loss.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    initial_carry: PyTree
    xs: PyTree
    targets: PyTree
    flags: Flags
    loss_dtype: Any


def make_sequence(
    plan: Plan,
    loss_fn: Callable[..., Any],
    has_aux: bool,
    initial_carry: PyTree,
    xs: PyTree,
    targets: PyTree,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> Sequence:
    """Check what a sequence is made of."""
    length = checks.sequence_length(xs, targets)
    x, target = jax.tree.map(lambda leaf: leaf[0], (xs, targets))
    batch = batch_size(initial_carry, x)
    named = {"resets": resets, "valid": valid}
    flags = {k: None if f is None else checks.check_flags(f, (length, batch), k) for k, f in named.items()}
    y = jax.tree.map(lambda aval: aval.update(shape=(batch, *aval.shape)), plan.output_avals)
    loss = jax.eval_shape(loss_fn, y, target)
    checks.check_loss(loss, has_aux, batch)
    return Sequence(loss_fn, has_aux, initial_carry, xs, targets, Flags(**flags), (loss[0] if has_aux else loss).dtype)


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
    rows = [plan.nodes[v].carry.size for v in _with_dense_rows(plan)]
    if rows:
        widest = max(node.carry.size + node.input.size for node in plan.nodes)
        layers = max(plan.depth(v) for v in range(len(plan.nodes)))
        room = _ROOM // (batch * layers * max(rows) * widest * np.dtype(plan.dtype).itemsize)
        longest = int(np.clip(min(2 * max(rows), room), 8, 128))
        reason = f"a trace with dense rows moves once a segment, at {max(rows)} multiply-adds a number"
    else:
        longest, reason = 64, "traces of local rows move once a segment, whose activations fit the cache"
    fitting = [length for length in range(longest // 2, longest + 1) if steps and length and steps % length == 0]
    return Length(max(fitting, default=longest), reason)


_ROOM = 2**27
"""Bytes that the cotangents of all dense rows may take inside a segment, roughly."""


def _with_dense_rows(plan: Plan) -> list[int]:
    own = [v for v, blocks in enumerate(plan.own) if plan.bands[v] or any(block.kind is Rows.DENSE for block in blocks)]
    return own + [v for v, _ in plan.pairs]


class Result(NamedTuple):
    """Sums over the steps, aux per step, and what the stream goes on from."""

    loss: jax.Array
    aux: PyTree
    grads: list[list[jax.Array]]
    end: Stream


def by_segments(
    plan: Plan,
    params: PyTree,
    start: Stream,
    sequence: Sequence,
    length: int,
    exact: bool,
) -> Result:
    """Segments of ``length`` steps, the last one shorter; in some plans single steps with influences going up."""
    ready = prepare(plan, params)
    loss_and_dy = jax.vmap(_loss_and_dy(sequence))
    up = length == 1 and not exact and upward.applies(plan)
    together = not up and joint.applies(plan, length, jax.tree.leaves(sequence.xs)[0].shape[1])

    def run(sums: tuple[Stream, jax.Array, Any], inputs: Any) -> tuple[tuple[Stream, jax.Array, Any], PyTree]:
        stream, loss, grads = sums
        xs, targets, flags = inputs
        part = Segment(ready, stream.carry, sequence.initial_carry, xs, flags)
        (values, aux), dy = loss_and_dy(part.outputs, targets, flags.valid)
        if flags.valid is not None:
            dy = keep_examples(flags.valid, dy)
        traces = stream.traces
        if flags.resets is not None:  # by where, so that nothing of what a trace held can spread
            traces = without_examples(plan, flags.resets[0], traces)
        found = segment_gradient(part, traces, dy, exact, split=not up)
        if up:
            moved = upward.update(part, traces)
            new = moved if flags.valid is None else select_traces(flags.valid[0], moved, traces)
        else:
            if flags.resets is not None:
                traces = without_examples(plan, flags.resets.any(axis=0), traces)
            new = advance_traces(part.after_resets(), traces)
        sums = (Stream(part.carry_end, new), loss + values.sum(), jax.tree.map(jnp.add, grads, found))
        return sums, aux

    traces = start.traces if up else split_slots(plan, start.traces)
    traces = joint.pack(plan, traces) if together else joint.unpack(plan, traces)
    begin = Stream(start.carry, vary_like(traces, start.carry))
    inputs = (sequence.xs, sequence.targets, sequence.flags)
    sums = (begin, *vary_like((jnp.zeros((), sequence.loss_dtype), _zero_gradient(plan)), begin))
    steps = jax.tree.leaves(sequence.xs)[0].shape[0]
    whole = steps // length

    def at(sums_and_start: Any, _: None) -> Any:
        """A segment cut out where it is needed: XLA would copy a sequence that is reshaped or shortened before."""
        sums, start = sums_and_start
        sums, aux = run(sums, jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, length), inputs))
        return (sums, start + length), aux

    auxes = []
    if whole == 1:
        sums, aux = run(sums, jax.tree.map(lambda leaf: leaf[:length], inputs))
        auxes.append(aux)
    elif whole:
        (sums, _), aux = lax.scan(at, (sums, jnp.zeros((), int)), None, whole)
        auxes.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux))
    if steps % length:
        sums, aux = run(sums, jax.tree.map(lambda leaf: leaf[whole * length :], inputs))
        auxes.append(aux)
    end, loss, grads = sums
    aux = auxes[0] if len(auxes) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *auxes)
    traces = end.traces if up else join_slots(plan, joint.unpack(plan, end.traces))
    return Result(loss, aux, grads, Stream(end.carry, traces))


def _loss_and_dy(sequence: Sequence) -> Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]]:
    """``(y_t, target_t, valid_t) -> ((loss_t, aux), dL_t/dy_t)``; losses per example are summed over valid ones."""

    def with_aux(y: PyTree, target: PyTree, valid: jax.Array | None) -> tuple[jax.Array, PyTree]:
        found = sequence.loss_fn(y, target)
        loss, aux = found if sequence.has_aux else (found, None)
        if loss.ndim and valid is not None:
            loss = jnp.where(valid, loss, 0)
        return loss.sum() if loss.ndim else loss, aux

    return jax.value_and_grad(with_aux, has_aux=True, allow_int=True)


def _zero_gradient(plan: Plan) -> list[list[jax.Array]]:
    return [[jnp.zeros(shape, plan.dtype) for shape in plan.leaf_shapes(v)] for v in range(len(plan.nodes))]


def as_params(plan: Plan, grads: list[list[jax.Array]]) -> PyTree:
    """Gradients of real leaves as a pytree like params."""
    found = []
    for v, node_grads in enumerate(grads):
        join, depth = plan.nodes[v].params.join_gradient, plan.graph.nodes[v].depth
        found.append(join(node_grads) if depth is None else jax.vmap(join, axis_size=depth)(node_grads))
    return assemble(plan.graph, found)


def keep_examples(where: jax.Array, dy: PyTree) -> PyTree:
    """A cotangent without the examples where ``where`` is false; integer outputs have none (``float0``).

    Args:
      where: (batch,) or (time, batch).
      dy: leaves with the same leading axes.
    """

    def keep(leaf: Any) -> Any:
        if leaf.dtype == jax.dtypes.float0:
            return leaf
        return jnp.where(where.reshape(where.shape + (1,) * (leaf.ndim - where.ndim)), leaf, 0)

    return jax.tree.map(keep, dy)
