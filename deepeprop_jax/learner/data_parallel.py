"""A batch over the devices of a mesh: each runs its own examples, and one sum a call joins loss and gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepeprop_jax.learner import checks, contract
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, documented_by
from deepeprop_jax.learner.one_sum import summed
from deepeprop_jax.learner.own_losses import split_targets, step_of
from deepeprop_jax.learner.sharded import EVERYWHERE, Split, arrays_apart, shapes_of, state_specs
from deepeprop_jax.network.arguments import batch_size
from deepeprop_jax.network.cell import PyTree, graph_of


def data_parallel(learner: OnlineLearner, mesh: Mesh, *, axis: str | Sequence[str] | None = None) -> OnlineLearner:
    """A learner whose every call runs over the devices of a mesh, each with its own examples of the batch.

    Its functions take what the learner's take: ordinary arrays, or arrays that are split already. Params are whole on
    every device; carry, x, xs, resets, valid and the state are split along their batch axis. Loss and gradient come out
    whole. Axes of the mesh may be of any type.

    *Cost*: ``value_and_grad`` and ``gradient`` send one all-reduce a call, of |params| + 1 numbers, and nothing inside
    the loop over time; ``init``, ``step`` and ``reset`` send nothing. A device holds params, and its examples with
    their traces.

    *Losses* must be one per example, (batch,), each of that example alone, and auxiliary outputs (batch, ...): a scalar
    loss is refused, since the mean of a part is not a part of the mean. Leaves of the targets shaped (time, batch, ...)
    are split where an example's loss needs its own part of them only; others are whole everywhere.

    Args:
      learner: from ``deep_eprop``, or of a rule that draws nothing at random.
      mesh: from ``jax.make_mesh``.
      axis: of the mesh, along which the batch is split; several for a product of them. None for all.

    Returns:
      An ``OnlineLearner``. Its gradient is that of ``learner``, in another order of one sum. It hashes; it does not
      pickle, as devices do not. Without ``jax.jit`` every operation is a program over the devices of its own: use it.

    Raises:
      TypeError: something that is no learner or no mesh.
      ValueError: an axis that the mesh has not. In calls, a batch that does not divide over the devices; a loss that is
        not one per example.

    >>> import jax, jax.numpy as jnp
    >>> from deepeprop_jax import deep_eprop
    >>> from deepeprop_jax.cells import leaky_rnn
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> learner = data_parallel(deep_eprop(leaky_rnn(4)), mesh)
    >>> xs = jnp.ones((6, 2 * jax.device_count(), 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> state = jax.jit(learner.init)(params, carry, xs[0])
    >>> loss_fn = lambda y, target: target * (y**2).sum(axis=-1)  # one per example
    >>> (loss, state), grads = jax.jit(learner.value_and_grad(loss_fn))(params, state, xs, jnp.ones(6, jnp.float32))
    >>> loss.shape
    ()
    """
    if not isinstance(learner, OnlineLearner):
        raise TypeError(f"data_parallel needs a learner, as deep_eprop makes it; seen {type(learner).__name__}.")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"data_parallel needs a jax.sharding.Mesh, as from jax.make_mesh; seen {type(mesh).__name__}.")
    axes = mesh.axis_names if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [name for name in axes if name not in mesh.axis_names]
    if missing or not axes:
        raise ValueError(f"axis must name axes of the mesh, which has {mesh.axis_names}; seen {axis!r}.")
    made = _OverDevices(learner, Split(mesh, axes))
    functions = made.init, made.step, made.gradient, made.value_and_grad, made.reset
    return OnlineLearner(*functions, learner.network, learner.plan)


class _OverDevices:
    """The functions of a learner over devices."""

    def __init__(self, learner: OnlineLearner, split: Split):
        self._learner, self._split, self._graph = learner, split, graph_of(learner.network)
        self._devices = math.prod(split.mesh.shape[name] for name in split.axes)

    def _checked(self, carry: PyTree, x: PyTree) -> int:
        batch = batch_size(carry, x)
        if batch % self._devices:
            raise ValueError(
                f"A batch of {batch} examples does not divide over {self._devices} devices (axes {self._split.axes} of "
                f"the mesh). Needed is a multiple of {self._devices}: leave {batch % self._devices} out, or add "
                f"{-batch % self._devices} with valid=False."
            )
        return batch

    def _specs(self, state: LearnerState) -> LearnerState:
        if not isinstance(state, LearnerState):
            raise TypeError(f"state must be what learner.init or learner.step returned; seen {type(state).__name__}.")
        self._checked(state.carry, state.pending.x)
        return state_specs(self._graph, state, self._split)

    def _run(self, function: Callable[..., PyTree], arguments: tuple, specs: tuple, out_specs: PyTree) -> PyTree:
        """``function`` on every device, of its part of the arguments."""
        mesh = self._split.mesh
        # Nothing varies in JAX's types: what is summed is summed here, once, and the learner adds no sum of its own.
        over = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        return over(*jax.tree.map(functools.partial(_placed, mesh), specs, arguments))

    @documented_by(contract.Init)
    def init(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        self._checked(carry, x)
        state = jax.eval_shape(self._learner.init, *shapes_of((params, carry, x)))
        random = [leaf for leaf in jax.tree.leaves(state.traces) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        if random:
            raise ValueError(
                "data_parallel takes no rule that draws at random for each example: each device would draw the same. "
                "Use a learner of deep_eprop, or one device."
            )
        batch, held = self._split.spec(), self._specs(state)
        return self._run(self._learner.init, (params, carry, x), (EVERYWHERE, batch, batch), held)

    @documented_by(contract.Step)
    def step(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        batch, held = self._split.spec(), self._specs(state)
        return self._run(self._learner.step, (params, state, x), (EVERYWHERE, held, batch), (held, batch))

    @documented_by(contract.Gradient)
    def gradient(
        self, params: PyTree, state: LearnerState, dy: PyTree, signals: PyTree = None, per_example: bool = False
    ) -> PyTree:
        batch, held = self._split.spec(), self._specs(state)
        active = state.pending.active
        if not isinstance(active, jax.core.Tracer) and not active.any():
            raise ValueError("No step is pending in this state. Call learner.step first, then learner.gradient.")
        options: dict[str, PyTree] = {"per_example": True} if per_example else {}

        def part(params: PyTree, state: LearnerState, dy: PyTree, signals: PyTree) -> PyTree:
            given = options if signals is None else options | {"signals": signals}
            grads = self._learner.gradient(params, state, dy, **given)
            here = state.pending.active.any()  # a device all of whose examples were reset has none of the gradient
            grads = jax.tree.map(lambda leaf: jnp.where(here, leaf, 0) if _is_number(leaf) else leaf, grads)
            count = here.astype(jnp.float32)
            if per_example:
                count = summed(count, self._split.axes)
            else:
                grads, count = summed((grads, count), self._split.axes)
            return jax.tree.map(lambda leaf: jnp.where(count > 0, leaf, jnp.nan) if _is_number(leaf) else leaf, grads)

        out_specs = batch if per_example else EVERYWHERE
        return self._run(part, (params, state, dy, signals), (EVERYWHERE, held, batch, batch), out_specs)

    @documented_by(contract.ValueAndGrad)
    def value_and_grad(self, loss_fn: Callable[..., PyTree], **options) -> contract.RunSequence:
        self._learner.value_and_grad(loss_fn, **options)  # refuses options that do not fit
        has_aux, signals = options.get("has_aux", False), options.get("signals")
        in_time = self._split.spec(None)

        @documented_by(contract.RunSequence)
        def run(params, state, xs, targets, resets=None, valid=None):
            held = self._specs(state)
            given, signals_of = arrays_apart(signals)
            own = self._own_targets(params, state, xs, targets, loss_fn, has_aux, signals)

            def part(given, *arguments):
                options_here = options | ({"signals": signals_of(given)} if given else {})
                (loss, end), grads = self._learner.value_and_grad(loss_fn, **options_here)(*arguments)
                loss, aux = loss if has_aux else (loss, None)
                loss, grads = summed((loss, grads), self._split.axes)
                return ((loss, aux) if has_aux else loss, end), grads

            loss_specs = (EVERYWHERE, in_time) if has_aux else EVERYWHERE
            where = (EVERYWHERE, EVERYWHERE, held, in_time, own, in_time, in_time)
            arguments = (given, params, state, xs, targets, resets, valid)
            return self._run(part, arguments, where, ((loss_specs, held), EVERYWHERE))

        return run

    def _own_targets(self, params, state, xs, targets, loss_fn, has_aux, signals) -> PyTree:
        """How targets are split."""
        checks.sequence_length(xs, targets)
        x = jax.tree.map(lambda leaf: leaf[0], xs)
        batch = self._checked(state.carry, x)
        _, y = jax.eval_shape(jax.vmap(self._learner.network.apply, (None, 0, 0)), *shapes_of((params, state.carry, x)))
        own = split_targets(loss_fn, has_aux, signals, step_of(y, targets, batch, self._devices))
        specs = [self._split.spec(None) if split else EVERYWHERE for split in own]
        return jax.tree.unflatten(jax.tree.structure(targets), specs)

    @documented_by(contract.Reset)
    def reset(self, state: LearnerState, where: jax.Array) -> LearnerState:
        batch, held = self._split.spec(), self._specs(state)
        return self._run(self._learner.reset, (state, where), (held, batch), held)


def _is_number(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _placed(mesh: Mesh, spec: PartitionSpec, part: PyTree) -> PyTree:
    """Arrays at hand moved to where they are needed; those that are traced are told to be there."""
    held = NamedSharding(mesh, spec)

    def place(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not isinstance(leaf, jax.core.Tracer):
            return jax.device_put(leaf, held)
        return jax.sharding.reshard(leaf, held) if AxisType.Explicit in mesh.axis_types else leaf

    return jax.tree.map(place, part)
