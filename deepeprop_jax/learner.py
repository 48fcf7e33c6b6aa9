"""The learner: pure functions that carry gradient information alongside the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from deepeprop_jax.cell import Cell, PyTree


class Pending(NamedTuple):
    """The last step, whose trace update waits until the next one.

    Attributes:
      carry, x: what entered it.
      update: what moves the traces, taken at the parameters of that step, so that they never mix the parameters of two:
        per node the factors of the update, where all traces are own ones with local rows; else those parameters.
      active: (batch,) bool, whether there is such a step.
    """

    carry: PyTree
    x: PyTree
    update: PyTree
    active: jax.Array


class LearnerState(NamedTuple):
    """The state of a stream: constant in size, whatever the length of the stream.

    Attributes:
      carry: the network's carry, with a leading batch axis.
      traces: S^{v,k} per kept pair of nodes, keyed ``"v <- k"``. A node's own traces are a tuple of arrays
        (batch, rows, columns); an influence across nodes is one array (batch, n, columns). Nodes with depth have a
        leading axis of layers, and for influences between their own layers one of the kept pairs of layers. With
        ``rank=R``, what is held as one product stands as ``"v <- v, low rank"``.
      pending: the last step, not yet in the traces.
      initial_carry: the carry given to ``init``, to which ``reset`` returns.
    """

    carry: PyTree
    traces: PyTree
    pending: Pending
    initial_carry: PyTree


class Init(Protocol):
    """Make the state of a stream."""

    def __call__(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        """Traces start at zero: the initial carry is a constant.

        Args:
          params: as from ``learner.network.init``.
          carry: with a leading batch axis on every leaf.
          x: one step's input (batch, ...); only its shapes and dtypes are used.

        Returns:
          A state that shares no buffer with the arguments, so that it may be donated.

        Raises:
          ValueError: params, carry or x that do not fit the network, with the node's name.
        """
        ...


class Step(Protocol):
    """Run the network for one step."""

    def __call__(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        """Apply the pending trace update, then step; this step's own update is left pending.

        Args:
          params: may differ from those of the step before.
          state: of this learner.
          x: (batch, ...).

        Returns:
          The next state, and the output y_t (batch, ...).
        """
        ...


class Gradient(Protocol):
    """The gradient that the last step's loss contributes."""

    def __call__(self, params: PyTree, state: LearnerState, dy: PyTree) -> PyTree:
        """``inst + sum of lambda_{t-1} . S_{t-1}``, linear in dy; call it as often as needed, also under ``vmap``.

        Args:
          params: those given to the last ``step``: an update of them comes after the gradient.
          state: as returned by it, before any ``reset``, which drops the step of the examples that it resets.
          dy: dL_t/dy_t, shaped as the output, in ``jax.grad``'s convention where complex.

        Returns:
          Gradient in the structure, shapes and dtypes of params, summed over the batch.

        Raises:
          ValueError: no step is pending. Inside ``jit``, where that cannot be seen, the gradient is NaN.
        """
        ...


class ValueAndGrad(Protocol):
    """Loss and gradient of a sequence, forward in time."""

    def __call__(
        self,
        loss_fn: Callable[..., Any],
        *,
        segment_length: int | None = None,
        within_segment: str = "eprop",
        has_aux: bool = False,
    ) -> Callable[..., Any]:
        """Turn a loss per step into a function that runs a sequence, in segments that move the traces once each.

        With ``within_segment="eprop"`` the gradient is that of the learner, whatever the segments' length: as if every
        step moved the traces. With ``"exact"`` credit inside a segment is exact, and the traces carry it across: the
        sum over segments of the gradient of that segment's loss, with deep e-prop before the segment alone.

        *Cost*: one segment's activations, and a trace's move per segment. Traces with dense rows also pull that many
        cotangents back through each segment.

        Args:
          loss_fn: ``loss_fn(y_t, target_t) -> scalar`` on the batched output of one step; with ``has_aux``,
            ``-> (scalar, aux)``.
          segment_length: C, steps per segment; the last one may be shorter. None chooses it from the analysis (with
            "exact" it must be given); a ``stack(cell, depth=L)`` with ``hops`` of one or more runs step by step.
          within_segment: "eprop" or "exact".
          has_aux: whether loss_fn returns an auxiliary output.

        Returns:
          ``run(params, state, xs, targets, resets=None, valid=None) -> ((loss, state), grads)``; with ``has_aux``
          ``(((loss, aux), state), grads)``, aux stacked over time. The loss is the sum over steps.

          * xs: (time, batch, ...); targets: any pytree with a leading time axis.
          * resets: (time, batch) bool; before such a step the example returns to its initial carry, with zero traces.
          * valid: (time, batch) bool; elsewhere carry and traces are held, and the example's output gets no cotangent
            (its loss is still in the value: mask that by weights in targets). Its x must be finite: pad with zeros.

          Memory: constant in time, but for xs, targets and aux.

        Raises:
          ValueError: "exact" with a ``stack(cell, depth=L)`` and ``hops`` >= 1; an option out of range; shapes
            that do not fit.
        """
        ...


class Reset(Protocol):
    """Start some examples anew, between steps."""

    def __call__(self, state: LearnerState, where: jax.Array) -> LearnerState:
        """Return examples to their initial carry, with traces at zero; drops their pending update.

        Take the last step's ``gradient`` before: a reset example has no part in it afterwards.

        Args:
          state: of this learner.
          where: (batch,) bool.
        """
        ...


class OnlineLearner(NamedTuple):
    """What ``deep_eprop`` returns: pure functions, to be jitted, vmapped and scanned over.

    Attributes:
      init: ``init(params, carry, x) -> state``.
      step: ``step(params, state, x) -> (state, y)``.
      gradient: ``gradient(params, state, dy) -> grads``.
      value_and_grad: ``value_and_grad(loss_fn)(params, state, xs, targets) -> ((loss, state), grads)``.
      reset: ``reset(state, where) -> state``.
      network: the network as a ``Cell``; its ``init`` makes params and carry, its ``apply`` runs without traces.
      plan: ``plan(params, carry, x)``: what was found out about the network, for ``analyse``.
    """

    init: Init
    step: Step
    gradient: Gradient
    value_and_grad: ValueAndGrad
    reset: Reset
    network: Cell
    plan: Callable[[PyTree, PyTree, PyTree], Any]
