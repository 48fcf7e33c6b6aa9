"""The learner: pure functions that carry gradient information alongside the forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax

from deepeprop_jax.network.cell import Cell, PyTree, reduced
from deepeprop_jax.traces.plan import Plan

F = TypeVar("F", bound=Callable[..., PyTree])


class Pending(NamedTuple):
    """The last step, whose trace update waits until the next one.

    Attributes:
      carry, x: what entered it.
      update: what moves the traces, taken at the parameters of that step, so that they never mix the parameters of two:
        per node the factors of the update, where all traces are own ones with local rows; else those parameters. With
        a projected carry it is a ``Window`` of the steps since the last projection, which are run again at the
        parameters of the last one.
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
        (batch, rows, columns); an influence across nodes is one array (batch, n, columns), or, where v only filters
        k's output, a tuple of arrays (batch, constants of the filter, columns). Nodes with depth have a leading axis of
        layers, and for influences between their own layers one of the kept pairs of layers. With
        ``rank=R``, what is held as one product stands as ``"v <- v, low rank"``; with ``carry_rank=R`` all influences
        together as ``"projected carry"``, a ``ProjectedCarry``.
      pending: the last step, not yet in the traces.
      initial_carry: the carry given to ``init``, to which ``reset`` returns.
    """

    carry: PyTree
    traces: PyTree
    pending: Pending
    initial_carry: PyTree


class Init(Protocol):
    """Make the state of a stream; traces start at zero, as the initial carry is a constant.

    Args:
      params: as from ``learner.network.init``. A Python number is an array of JAX's default dtype, here and in all
        other functions. Integer leaves are constants: no trace, a zero gradient, and a warning unless ``trainable``
        says False for them.
      carry: with a leading batch axis on every leaf.
      x: ONE step's input (batch, ...), such as ``xs[0]``; only its shapes and dtypes are used.
      key: of the draws of a rule that draws at random (``deepeprop_jax.rules``); others refuse one.

    Returns:
      A state that shares no buffer with the arguments, so that it may be donated, and that no step changes in type: its
      leaves are strongly typed, whatever the arguments are.

    Raises:
      TypeError: a leaf that is neither an array nor a number, with its path.
      ValueError: params, carry or x that do not fit the network, with the node's name; a key for a rule without draws.
    """

    def __call__(self, params: PyTree, carry: PyTree, x: PyTree, key: jax.Array | None = None) -> LearnerState: ...


class Step(Protocol):
    """Apply the pending trace update, then run the network for one step, whose own update is left pending.

    Args:
      params: may differ from those of the step before.
      state: of this learner. One of another learner is refused if its nesting, names, shapes or dtypes tell. Where they
        are all the same (another ``trainable`` with leaves of the same shapes, another activation), it is taken for
        this one's.
      x: ONE step (batch, ...).

    Returns:
      The next state, and the output y_t (batch, ...).

    Raises:
      TypeError: no state; a leaf that is neither an array nor a number.
      ValueError: params, state or x that do not fit each other or the network.
    """

    def __call__(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]: ...


class Gradient(Protocol):
    """The gradient that the last step's loss contributes: ``inst + sum of lambda_{t-1} . S_{t-1}``.

    It is linear in dy and signals; call it as often as needed. Several signals at once, such as those of a policy and a
    value: ``jax.vmap(lambda dy: learner.gradient(params, state, dy))(dys)``, dys (signals, batch, ...).

    *Cost* of ``per_example``: the time of a gradient, and its size for each example. Without it, nothing of that size
    is held.

    Args:
      params: those given to the last ``step``: an update of them comes after the gradient.
      state: as returned by it, before any ``reset``, which drops the step of the examples that it resets.
      dy: dL_t/dy_t, shaped as the output, in ``jax.grad``'s convention where complex.
      signals: for a learner made with ``signals=(names)``: {name: (batch, ...), shaped as the node's output}, what
        stands in place of the cotangent of that output.
      per_example: whether every example's part stands on its own.

    Returns:
      Gradient in the structure, shapes and dtypes of params, summed over the batch; zeros for integers, ``float0`` for
      PRNG keys. Complex leaves are in ``jax.grad``'s convention, the conjugate of the direction in which the loss
      rises: give optimisers ``jax.tree.map(jnp.conj, grads)``. With ``per_example`` every leaf has the batch as a
      leading axis, (batch, ...), split over a mesh as the batch is, with zeros for an example that was reset; their sum
      is the gradient.

    Raises:
      TypeError: per_example is neither True nor False: it has to be known before anything runs.
      ValueError: no step is pending. Inside ``jit``, where that cannot be seen, the gradient is NaN (zeros with
        ``per_example`` of a batch that is split over a mesh).
    """

    def __call__(
        self,
        params: PyTree,
        state: LearnerState,
        dy: PyTree,
        signals: Mapping[str, PyTree] | None = None,
        per_example: bool = False,
    ) -> PyTree: ...


class ValueAndGrad(Protocol):
    """Turn a loss per step into a function that runs a sequence, in segments that move the traces once each.

    With ``within_segment="eprop"`` the gradient is that of the learner, whatever the segments' length: as if every step
    moved the traces. With ``"exact"`` credit inside a segment is exact, and the traces carry it across: the sum over
    segments of the gradient of that segment's loss, with deep e-prop before the segment alone. A projected carry
    (``carry_rank=R``) is always exact inside a segment, whatever ``within_segment`` is, and its gradient depends on the
    segments' length.

    *Cost*: one segment's activations, and a trace's move per segment. Traces with dense rows also pull that many
    cotangents back through each segment.

    Args:
      loss_fn: ``loss_fn(y_t, target_t) -> loss`` on the batched output of one step; with ``has_aux``,
        ``-> (loss, aux)``. The loss is a real scalar, or one number per example, (batch,): those are summed, over the
        examples that are ``valid``.
      segment_length: C, steps per segment; the last one may be shorter. None chooses it from the analysis (with "exact"
        it must be given).
      within_segment: "eprop" or "exact".
      has_aux: whether loss_fn returns an auxiliary output.
      signals: for a learner made with ``signals=(names)``: {name: signal}, a signal being a function
        ``(dy_t, target_t) -> (batch, ...)`` that makes from dL_t/dy_t what stands in place of the cotangent of the
        node's output, such as what ``random_feedback`` gives.
      window: C, for losses that need several steps together, such as returns. loss_fn then sees C steps, ys and targets
        (C, batch, ...), time first; the last window may be shorter. The loss is a real scalar, or one number per step
        and example, (C, batch); aux is (C, ...). The loss is the sum over windows; each is a segment, and credit goes
        on to those before it by the traces, as the dL/dy_t of any loss does. What loss_fn takes from behind the window,
        such as the value to bootstrap from, comes in the targets, and is a constant. Resets are not shown to loss_fn:
        put discounts of zero, or the flags, into the targets. ``carry_basis`` and ``error_meter`` take losses of single
        steps alone.
      time_major: False for xs, targets, resets, valid and aux of shape (batch, time, ...). What loss_fn sees, and an
        aux that is one number per step, stay as they are; any other aux has the batch as the first axis of a step.

    Returns:
      ``run(params, state, xs, targets, resets=None, valid=None, seq_lengths=None) -> ((loss, state), grads)``: see
      ``RunSequence``.

    Raises:
      TypeError: loss_fn is no function; an option of a wrong type.
      ValueError: an option out of range; a window beside another segment_length.
    """

    def __call__(
        self,
        loss_fn: Callable[..., PyTree],
        *,
        segment_length: int | None = None,
        within_segment: str = "eprop",
        has_aux: bool = False,
        signals: Mapping[str, Callable[..., PyTree]] | None = None,
        window: int | None = None,
        time_major: bool = True,
    ) -> RunSequence: ...


class RunSequence(Protocol):
    """Run a sequence, or the next piece of a stream: its loss, the sum over steps, and the gradient of that.

    *Memory*: constant in time, but for xs, targets and aux.

    Args:
      params: as from ``learner.network.init``.
      state: of this learner; its pending step moves the traces first.
      xs: (time, batch, ...).
      targets: any pytree with a leading time axis.
      resets: (time, batch) bool; before such a step the example returns to its initial carry, with zero traces.
      valid: (time, batch) bool; elsewhere carry and traces are held (a projected carry is projected once a segment all
        the same), and the example's output gets no cotangent. Its x
        must be finite: pad with zeros. Where loss_fn returns one loss per example, value and gradient belong together.
        A scalar has no examples to leave out: those that are not valid still count in the value, though not in the
        gradient. The cure, in two lines: ``targets = (targets, valid)`` and
        ``loss_fn = lambda y, target: jnp.where(target[1], losses(y, target[0]), 0).sum()``.
      seq_lengths: in place of valid, (batch,) integers from 0 to the number of steps: how many of them are valid, the
        first ones, as in Flax's ``nn.RNN``.

    Returns:
      ``((loss, state), grads)``; with ``has_aux`` ``(((loss, aux), state), grads)``, aux stacked over time. The state
      has no step pending; grads are as from ``learner.gradient``, and may be differentiated: with exact=True their
      derivative is that of BPTT's gradient, by the parameters and by the first carry; in other modes that of their own
      values.

    Raises:
      TypeError: no state; a leaf of params or xs that is neither an array nor a number.
      ValueError: shapes that do not fit; a loss that is neither a real scalar nor one per example; both valid and
        seq_lengths.
    """

    def __call__(
        self,
        params: PyTree,
        state: LearnerState,
        xs: PyTree,
        targets: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
    ) -> tuple[tuple[PyTree, LearnerState], PyTree]: ...


class Reset(Protocol):
    """Between steps, return some examples to their initial carry, with traces at zero; drops their pending update.

    Take the last step's ``gradient`` before: a reset example has no part in it afterwards.

    Args:
      state: of this learner.
      where: (batch,) bool.

    Raises:
      TypeError: no state; where is no array.
      ValueError: the state of another network; where of another dtype or shape.
    """

    def __call__(self, state: LearnerState, where: jax.Array) -> LearnerState: ...


class Shardings(NamedTuple):
    """Where arrays lie on the devices of a mesh: a ``jax.sharding.NamedSharding`` for every leaf.

    Attributes:
      params: of params, gradients and an optimiser's state: whole on every device.
      carry, x: of a carry, and of one step's input, targets or flags: split along their first axis, the batch.
      xs: of a sequence, its resets and valid, and targets of each example: split along their second axis.
      state: of a ``LearnerState``; with ``unit`` its traces also along their last axis.
    """

    params: PyTree
    carry: PyTree
    x: PyTree
    xs: PyTree
    state: PyTree


class ShardingsOf(Protocol):
    """How ``data_parallel(learner, mesh, axis=batch, unit=unit)`` holds its arrays, for ``jax.device_put``, ``jax.jit``
    and checkpoints. Traces that do not fit a device are split along ``unit``, by columns: each device holds those of
    its part of every source parameter, cut along its last axis. Nothing is computed; shapes are enough.

    Args:
      mesh: from ``jax.make_mesh``.
      params, carry, x: as for ``init``, or their shapes.
      batch: axes of the mesh that split the batch; None for all but ``unit``.
      unit: axes of the mesh that split the traces; None for whole ones.

    Raises:
      ValueError: axes that the mesh has not; a batch that does not divide, with both numbers; with ``unit`` a learner
        whose traces have no columns of their own (``rank``, ``carry_factor``, other rules).
    """

    def __call__(
        self,
        mesh: jax.sharding.Mesh,
        params: PyTree,
        carry: PyTree,
        x: PyTree,
        *,
        batch: str | Sequence[str] | None = None,
        unit: str | Sequence[str] | None = None,
    ) -> Shardings: ...


def _unknown(mesh: jax.sharding.Mesh, params: PyTree, carry: PyTree, x: PyTree, **axes: object) -> Shardings:
    raise TypeError("Only a learner of deep_eprop tells shardings; see data_parallel for what other rules can do.")


def documented_by(contract: type) -> Callable[[F], F]:
    """Give a function the text of the contract that it keeps as its docstring, for ``help``."""

    def give(function: F) -> F:
        function.__doc__ = inspect.getdoc(contract)
        return function

    return give


class OnlineLearner(NamedTuple):
    """What ``deep_eprop`` returns: pure functions, to be jitted, vmapped and scanned over.

    It pickles as the call of ``deep_eprop`` that made it, if network and ``trainable`` do (see ``Cell``: Flax's modules
    need ``cloudpickle``), and hashes, so that it may be a static argument of ``jax.jit``.

    Attributes:
      init: ``init(params, carry, x) -> state``.
      step: ``step(params, state, x) -> (state, y)``.
      gradient: ``gradient(params, state, dy) -> grads``; with ``per_example=True`` each example's part of them.
      value_and_grad: ``value_and_grad(loss_fn)(params, state, xs, targets) -> ((loss, state), grads)``.
      reset: ``reset(state, where) -> state``.
      network: the network as a ``Cell``; its ``init`` makes params and carry, its ``apply`` runs without traces.
      plan: ``plan(params, carry, x)``: what was found out about the network, for ``analyse``.
      shardings: ``shardings(mesh, params, carry, x, batch=, unit=)``: where arrays lie on several devices.
    """

    init: Init
    step: Step
    gradient: Gradient
    value_and_grad: ValueAndGrad
    reset: Reset
    network: Cell
    plan: Callable[[PyTree, PyTree, PyTree], Plan]
    shardings: ShardingsOf = _unknown

    def __reduce__(self) -> tuple[object, ...]:
        return reduced(self)

    def __copy__(self) -> OnlineLearner:
        return self

    def __deepcopy__(self, memo: object) -> OnlineLearner:
        return self
