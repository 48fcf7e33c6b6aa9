"""A batch over the devices of a mesh: each runs its own examples, and one sum a call joins loss and gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepeprop_jax.learner import checks, contract
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, Shardings, documented_by
from deepeprop_jax.learner.layout import with_layouts
from deepeprop_jax.learner.one_sum import summed
from deepeprop_jax.learner.own_losses import split_targets, step_of
from deepeprop_jax.learner.parameter_parts import ParameterParts
from deepeprop_jax.learner.sharded import EVERYWHERE, Split, arrays_apart, parts_specs, state_specs
from deepeprop_jax.network.arguments import batch_size, shapes_of
from deepeprop_jax.network.cell import PyTree, graph_of


def data_parallel(
    learner: OnlineLearner,
    mesh: Mesh,
    *,
    axis: str | Sequence[str] | None = None,
    unit: str | Sequence[str] | None = None,
) -> OnlineLearner:
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

    *Traces that do not fit* a device are split along ``unit``: each device holds the columns of its part of every
    parameter, a leaf cut along its last axis (where that divides, else along the last one that does; a leaf without
    such an axis is kept by all). Columns never meet, so that nothing is sent in time; params are whole on every
    device, and each runs the whole network. ``rank`` and ``carry_factor`` are refused. A state belongs to this number
    of parts.

    Args:
      learner: from ``deep_eprop``, or of a rule that draws nothing at random.
      mesh: from ``jax.make_mesh``.
      axis: of the mesh, along which the batch is split; several for a product of them. None for all but ``unit``.
      unit: of the mesh, along which traces are split by parameters; None for whole traces.

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
    made = _OverDevices(learner, *_split(mesh, axis, unit))
    functions = made.init, made.step, made.gradient, with_layouts(made.value_and_grad), made.reset
    return OnlineLearner(*functions, learner.network, learner.plan, learner.shardings)


def how_held(
    learner: OnlineLearner,
    mesh: Mesh,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    batch: str | Sequence[str] | None,
    unit: str | Sequence[str] | None,
) -> Shardings:
    """See ``ShardingsOf``."""
    split, units = _split(mesh, batch, unit)
    made = _OverDevices(learner, split, units)
    state = made.shapes(params, carry, x)

    def held(specs: PyTree, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda s, part: jax.tree.map(lambda _: NamedSharding(mesh, s), part), specs, tree)

    xs = held(split.spec(None), x)
    return Shardings(
        held(EVERYWHERE, params), held(split.spec(), carry), held(split.spec(), x), xs, held(made.specs(state), state)
    )


def _split(
    mesh: Mesh, axis: str | Sequence[str] | None, unit: str | Sequence[str] | None
) -> tuple[Split, tuple[str, ...]]:
    """Over which axes the batch is split, and over which the traces."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"A jax.sharding.Mesh is needed, as from jax.make_mesh; seen {type(mesh).__name__}.")
    units = () if unit is None else _names(mesh, unit, "unit")
    rest = tuple(name for name in mesh.axis_names if name not in units)
    axes = rest if axis is None else _names(mesh, axis, "axis")
    if set(axes) & set(units):
        raise ValueError(f"axis and unit must name different axes of the mesh; seen {axis!r} and {unit!r}.")
    return Split(mesh, axes), units


def _names(mesh: Mesh, given: str | Sequence[str], what: str) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or not set(names) <= set(mesh.axis_names):
        raise ValueError(f"{what} must name axes of the mesh, which has {mesh.axis_names}; seen {given!r}.")
    return names


class _OverDevices:
    """The functions of a learner over devices."""

    def __init__(self, learner: OnlineLearner, split: Split, units: tuple[str, ...]):
        self._split, self._units, self._graph = split, units, graph_of(learner.network)
        self._devices = math.prod(split.mesh.shape[name] for name in split.axes)
        self._all_axes = (*split.axes, *units)
        self._network, self._plain = learner.network, learner
        parts = math.prod(split.mesh.shape[name] for name in units)
        self._learner = ParameterParts(learner, units, parts) if units else learner

    def _checked(self, carry: PyTree, x: PyTree) -> int:
        batch = batch_size(carry, x)
        if batch % self._devices:
            raise ValueError(
                f"A batch of {batch} examples does not divide over {self._devices} devices (axes {self._split.axes} of "
                f"the mesh). Needed is a multiple of {self._devices}: leave {batch % self._devices} out, or add "
                f"{-batch % self._devices} with valid=False."
            )
        return batch

    def shapes(self, params: PyTree, carry: PyTree, x: PyTree, key: jax.Array | None = None) -> LearnerState:
        """Structure of the state."""
        given = shapes_of((params, carry, x))
        if self._units and key is None:
            return self._learner.shapes(*given)
        return jax.eval_shape(functools.partial(self._plain.init, key=key), *given)

    def specs(self, state: LearnerState) -> LearnerState:
        """How a state is held, per leaf or per part of it."""
        if not isinstance(state, LearnerState):
            raise TypeError(f"state must be what learner.init or learner.step returned; seen {type(state).__name__}.")
        self._checked(state.carry, state.pending.x)
        if self._units:
            return parts_specs(self._graph, state, self._split, self._units)
        return state_specs(self._graph, state, self._split)

    def _run(self, function: Callable[..., PyTree], arguments: tuple, specs: tuple, out_specs: PyTree) -> PyTree:
        """``function`` on every device, of its part of the arguments."""
        mesh = self._split.mesh
        # Nothing varies in JAX's types: what is summed is summed here, once, and the learner adds no sum of its own.
        over = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        return over(*jax.tree.map(functools.partial(_placed, mesh), specs, arguments))

    @documented_by(contract.Init)
    def init(self, params: PyTree, carry: PyTree, x: PyTree, key: jax.Array | None = None) -> LearnerState:
        self._checked(carry, x)
        # A learner that draws nothing refuses a key; one that draws is refused here.
        state = self.shapes(params, carry, x, key)
        random = [leaf for leaf in jax.tree.leaves(state.traces) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        if random:
            raise ValueError(
                "data_parallel takes no rule that draws at random for each example: each device would draw the same. "
                "Use a learner of deep_eprop, or one device."
            )
        batch, held = self._split.spec(), self.specs(state)
        return self._run(self._learner.init, (params, carry, x), (EVERYWHERE, batch, batch), held)

    @documented_by(contract.Step)
    def step(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        batch, held = self._split.spec(), self.specs(state)
        return self._run(self._learner.step, (params, state, x), (EVERYWHERE, held, batch), (held, batch))

    @documented_by(contract.Gradient)
    def gradient(
        self, params: PyTree, state: LearnerState, dy: PyTree, signals: PyTree = None, per_example: bool = False
    ) -> PyTree:
        if per_example and self._units:
            raise ValueError(
                "per_example gradients are whole for every example, as large as what unit= splits: leave one of them "
                "out."
            )
        batch, held = self._split.spec(), self.specs(state)
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
                count = summed(count, self._all_axes)
            else:
                grads, count = summed((grads, count), self._all_axes)
            return jax.tree.map(lambda leaf: jnp.where(count > 0, leaf, jnp.nan) if _is_number(leaf) else leaf, grads)

        out_specs = batch if per_example else EVERYWHERE
        return self._run(part, (params, state, dy, signals), (EVERYWHERE, held, batch, batch), out_specs)

    @documented_by(contract.ValueAndGrad)
    def value_and_grad(self, loss_fn: Callable[..., PyTree], **options) -> Callable[..., PyTree]:
        self._plain.value_and_grad(loss_fn, **options)  # refuses options that do not fit
        if options.get("window") is not None:
            raise ValueError(
                "data_parallel takes losses of one step; seen window. For a loss on a window split the batch over "
                "explicit axes of a mesh, and use the learner as it is."
            )
        has_aux, signals = options.get("has_aux", False), options.get("signals")
        in_time = self._split.spec(None)

        @documented_by(contract.RunSequence)
        def run(params, state, xs, targets, resets=None, valid=None):
            held = self.specs(state)
            given, signals_of = arrays_apart(signals)
            own = self._own_targets(params, state, xs, targets, loss_fn, has_aux, signals)

            def part(given, *arguments):
                options_here = options | ({"signals": signals_of(given)} if given else {})
                (loss, end), grads = self._learner.value_and_grad(loss_fn, **options_here)(*arguments)
                loss, aux = loss if has_aux else (loss, None)
                loss, grads = summed((loss, grads), self._all_axes)
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
        _, y = jax.eval_shape(jax.vmap(self._network.apply, (None, 0, 0)), *shapes_of((params, state.carry, x)))
        own = split_targets(loss_fn, has_aux, signals, step_of(y, targets, batch, self._devices))
        specs = [self._split.spec(None) if split else EVERYWHERE for split in own]
        return jax.tree.unflatten(jax.tree.structure(targets), specs)

    @documented_by(contract.Reset)
    def reset(self, state: LearnerState, where: jax.Array) -> LearnerState:
        batch, held = self._split.spec(), self.specs(state)
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
