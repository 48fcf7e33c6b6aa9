"""Loss and gradient of a sequence: its segments, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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

_ROOM = 2**27
"""Bytes that the cotangents of all dense rows may take inside a segment, roughly."""


class Stream(NamedTuple):
    """What goes from one segment to the next."""

    carry: PyTree
    traces: Traces


class Sums(NamedTuple):
    """What goes through the loop over time: the stream, and the sums so far, the gradient's per real leaf."""

    stream: Stream
    loss: jax.Array
    grads: list[list[jax.Array]]

    def plus(self, stream: Stream, loss: jax.Array, grads: list[list[jax.Array]]) -> Sums:
        """One step or segment on."""
        return Sums(stream, self.loss + loss, jax.tree.map(jnp.add, self.grads, grads))


Ended = tuple[tuple[PyTree, Stream], PyTree]
"""((loss, stream), gradient shaped as params), sums over the steps; with aux (loss, aux per step) for the loss."""


class Sequence(NamedTuple):
    """What a sequence is made of.

    Attributes:
      plan: of the network.
      loss_fn: ``(y_t, target_t) -> loss`` or ``(loss, aux)``, the loss a scalar or one per example.
      has_aux: which of the two.
      loss_dtype: of the loss.
      initial_carry: what an example returns to on a reset.
      inputs: xs, targets (time, ...) and flags (time, batch).
    """

    plan: Plan
    loss_fn: Callable[..., PyTree]
    has_aux: bool
    loss_dtype: np.dtype
    initial_carry: PyTree
    inputs: tuple[PyTree, PyTree, Flags]

    def begin(self, stream: Stream) -> Sums:
        """Before the first step."""
        plan = self.plan
        grads = [[jnp.zeros(shape, plan.dtype) for shape in plan.leaf_shapes(v)] for v in range(len(plan.nodes))]
        return Sums(stream, *vary_like((jnp.zeros((), self.loss_dtype), grads), stream, self.inputs))

    def loss_and_dy(
        self, y: PyTree, target: PyTree, valid: jax.Array | None
    ) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        """((loss_t, aux), dL_t/dy_t) of a step; losses per example are summed over valid ones."""

        def with_aux(y: PyTree) -> tuple[jax.Array, PyTree]:
            found = self.loss_fn(y, target)
            loss, aux = found if self.has_aux else (found, None)
            if loss.ndim and valid is not None:
                loss = jnp.where(valid, loss, 0)
            return loss.sum() if loss.ndim else loss, aux

        found, dy = jax.value_and_grad(with_aux, has_aux=True, allow_int=True)(y)
        return found, dy if valid is None else keep_examples(valid, dy)

    def losses_and_dy(
        self, outputs: PyTree, targets: PyTree, valid: jax.Array | None
    ) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        """``loss_and_dy`` of every step of a segment; of one step as it is, not under ``vmap``."""
        arguments = (outputs, targets, valid)
        if jax.tree.leaves(outputs)[0].shape[0] > 1:
            return jax.vmap(self.loss_and_dy)(*arguments)
        found = self.loss_and_dy(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], found)

    def ended(self, sums: Sums, aux: PyTree) -> Ended:
        """After the last step."""
        loss = (sums.loss, aux) if self.has_aux else sums.loss
        return (loss, sums.stream), as_params(self.plan, sums.grads)


def make_sequence(
    plan: Plan,
    loss_fn: Callable[..., PyTree],
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
    dtype = checks.loss_dtype(jax.eval_shape(loss_fn, y, target), has_aux, batch)
    return Sequence(plan, loss_fn, has_aux, dtype, initial_carry, (xs, targets, Flags(**flags)))


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
    rows = max((plan.nodes[v].carry.size for v in dense | {v for v, _ in plan.pairs}), default=0)
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
        found = segment_gradient(part, traces, dy, exact, split=not up)
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


def as_params(plan: Plan, grads: list[list[jax.Array]]) -> PyTree:
    """Gradients of real leaves as a pytree like params."""
    found = []
    for node, vertex, own in zip(plan.nodes, plan.graph.nodes, grads, strict=True):
        join = node.params.join_gradient
        found.append(join(own) if vertex.depth is None else jax.vmap(join, axis_size=vertex.depth)(own))
    return assemble(plan.graph, found)


def keep_examples(where: jax.Array, dy: PyTree) -> PyTree:
    """A cotangent without the examples where ``where``, (batch,), is false; integer outputs have none (``float0``)."""

    def keep(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jax.dtypes.float0:
            return leaf
        return jnp.where(where.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return jax.tree.map(keep, dy)
