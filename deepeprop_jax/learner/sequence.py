"""What a sequence is made of, and what goes from one of its segments to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.signals import Signal, shaped
from deepeprop_jax.network.arguments import batch_size
from deepeprop_jax.network.cell import PyTree, assemble
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.plan import Given, Plan, Traces


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
      loss_fn: ``(y_t, target_t) -> loss`` or ``(loss, aux)``, the loss a scalar or one per example; of a window the
        same of all of its steps, the loss a scalar or one per step and example.
      has_aux: which of the two.
      window: whether loss_fn sees a segment's steps together.
      loss_dtype: of the loss.
      initial_carry: what an example returns to on a reset.
      inputs: xs, targets (time, ...) and flags (time, batch).
      signals: the learning signals that were given, per node.
    """

    plan: Plan
    loss_fn: Callable[..., PyTree]
    has_aux: bool
    window: bool
    loss_dtype: np.dtype
    initial_carry: PyTree
    inputs: tuple[PyTree, PyTree, Flags]
    signals: Mapping[int, Signal]

    def begin(self, stream: Stream) -> Sums:
        """Before the first step."""
        plan = self.plan
        grads = [[jnp.zeros(shape, plan.dtype) for shape in plan.leaf_shapes(v)] for v in range(len(plan.nodes))]
        return Sums(stream, *vary_like((jnp.zeros((), self.loss_dtype), grads), stream, self.inputs))

    def loss_and_dy(
        self, y: PyTree, target: PyTree, valid: jax.Array | None
    ) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        """((loss_t, aux), dL_t/dy_t) of a step, or of a window; losses per example are summed over valid ones."""

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
        """``loss_and_dy`` of every step of a segment, or of all together; of one step as it is, not under ``vmap``."""
        arguments = (outputs, targets, valid)
        if self.window:
            return self.loss_and_dy(*arguments)
        if jax.tree.leaves(outputs)[0].shape[0] > 1:
            return jax.vmap(self.loss_and_dy)(*arguments)
        found = self.loss_and_dy(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], found)

    def given(self, dy: PyTree, targets: PyTree, valid: jax.Array | None) -> Given:
        """The signals of every step of a segment, none for examples that are not valid."""
        if not self.signals:
            return {}

        def of_step(dy: PyTree, target: PyTree, valid: jax.Array | None) -> Given:
            batch = batch_size(self.initial_carry, dy)
            found = {v: shaped(self.plan, v, signal(dy, target), batch) for v, signal in self.signals.items()}
            return found if valid is None else {v: keep_examples(valid, s) for v, s in found.items()}

        return jax.vmap(of_step)(dy, targets, valid)

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
    signals: Mapping[int, Signal] | None = None,
    window: int | None = None,
) -> Sequence:
    """Check what a sequence is made of.

    Args:
      window: how many steps ``loss_fn`` sees together; None for one at a time.
    """
    length = checks.sequence_length(xs, targets)
    x, target = jax.tree.map(lambda leaf: leaf[0], (xs, targets))
    batch = batch_size(initial_carry, x)
    named = {"resets": resets, "valid": valid}
    flags = {k: None if f is None else checks.check_flags(f, (length, batch), k) for k, f in named.items()}
    y = batched_output(plan, batch)
    lead: tuple[int, ...] = (batch,)
    if window is not None:
        lead = (min(window, length), batch)
        y = jax.tree.map(lambda aval: aval.update(shape=(lead[0], *aval.shape)), y)
        target = jax.tree.map(lambda leaf: leaf[: lead[0]], targets)
    dtype = checks.loss_dtype(jax.eval_shape(loss_fn, y, target), has_aux, lead)
    inputs = xs, targets, Flags(**flags)
    return Sequence(plan, loss_fn, has_aux, window is not None, dtype, initial_carry, inputs, signals or {})


def batched_output(plan: Plan, batch: int) -> PyTree:
    """Shapes and dtypes of the network's output at one step."""
    return jax.tree.map(lambda aval: aval.update(shape=(batch, *aval.shape)), plan.output_avals)


def as_params(plan: Plan, grads: list[list[jax.Array]]) -> PyTree:
    """Gradients of real leaves as a pytree like params."""
    found = []
    for node, vertex, own in zip(plan.nodes, plan.graph.nodes, grads, strict=True):
        join = node.params.join_gradient
        found.append(join(own) if vertex.depth is None else jax.vmap(join, axis_size=vertex.depth)(own))
    return assemble(plan.graph, found)


def keep_examples(where: jax.Array, dy: PyTree) -> PyTree:
    """A cotangent without the examples where ``where``, ([time,] batch), is false; integer outputs have none
    (``float0``)."""

    def keep(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jax.dtypes.float0:
            return leaf
        return jnp.where(where.reshape(*where.shape, *(1,) * (leaf.ndim - where.ndim)), leaf, 0)

    return jax.tree.map(keep, dy)
