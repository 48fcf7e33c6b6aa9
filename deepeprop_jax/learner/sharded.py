"""Batches that are split over a mesh with explicit axes: every device runs the learner on its own examples.

JAX then holds in an array's type how it is split, and refuses what would move examples between devices. Nothing here
moves them: the learner's functions run under ``jax.shard_map`` over the axes that split the batch. Gradients and losses
are summed in one ``psum`` at the end. A loss per example is computed where the example is, if it needs nothing of the
others (see ``per_example``); of any other loss every device computes all, from outputs gathered once per segment.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepeprop_jax.analysis.per_example import is_per_example
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, Pending
from deepeprop_jax.network.arguments import shapes_of
from deepeprop_jax.network.cell import Cell, Graph, PyTree
from deepeprop_jax.segments.single_step import Factors
from deepeprop_jax.segments.window import Window
from deepeprop_jax.traces.plan import Traces
from deepeprop_jax.traces.projected import NAME, ProjectedCarry

EVERYWHERE = PartitionSpec()
"""A whole copy on each device."""


class Split(NamedTuple):
    """How a batch is split: over which axes of which mesh."""

    mesh: Mesh
    axes: tuple[str, ...]

    def spec(self, *before: None) -> PartitionSpec:
        """Of an array whose batch axis has these axes before it."""
        return PartitionSpec(*before, self.axes)

    def run(self, function: Callable[..., PyTree], arguments: tuple, specs: tuple, out_specs: PyTree) -> PyTree:
        """``function`` of the part of every argument that a device has; ``specs`` and ``out_specs`` may be prefixes."""

        def place(spec: PartitionSpec, part: PyTree) -> PyTree:
            held = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda leaf: jax.sharding.reshard(jnp.asarray(leaf), held), part)

        over = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=out_specs, axis_names=frozenset(self.axes)
        )
        return over(*jax.tree.map(place, specs, arguments))


def split_of(trees: PyTree, axis: int = 0) -> Split | None:
    """How the batch is split, the axis number ``axis`` of every leaf; None where it is not, or not explicitly.

    Raises:
      ValueError: leaves that are split differently, or along other axes than the batch's.
    """
    found: list[Split] = []
    for leaf in jax.tree.leaves(trees):
        sharding = _sharding_of(leaf)
        if sharding is None:
            continue
        kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        named = [() if part is None else part if isinstance(part, tuple) else (part,) for part in sharding.spec]
        named = [tuple(name for name in part if kinds.get(name) == AxisType.Explicit) for part in named]
        if any(part for place, part in enumerate(named) if place != axis):
            raise ValueError(
                f"Of a learner's arrays only the batch axis may be split over a mesh; seen {jax.typeof(leaf)}, split "
                f"as {sharding.spec}. Bring the other axes together with jax.sharding.reshard."
            )
        if len(named) > axis and named[axis]:
            found.append(Split(sharding.mesh, named[axis]))
    if len({(split.axes, split.mesh.axis_names) for split in found}) > 1:
        raise ValueError(
            f"All arrays of a batch must be split over the same axes of one mesh; seen "
            f"{', '.join(sorted({str(split.axes) for split in found}))}. Use jax.sharding.reshard."
        )
    return found[0] if found else None


def batch_axes(graph: Graph, state: LearnerState) -> LearnerState:
    """The number of the batch's axis in all arrays of a state, as a prefix of it; None where they have no such axis."""
    deep = {vertex.name for vertex in graph.nodes if vertex.depth is not None}
    update = state.pending.update
    of_projected: Any = (0, 0, None, None, None)
    traces: Traces = {name: 1 if name.partition(" <- ")[0] in deep else 0 for name in state.traces}
    if NAME in traces:
        traces[NAME] = ProjectedCarry(*of_projected)
    by_example = isinstance(update, list) and all(isinstance(part, Factors) for part in update)
    # Other rules (rules/by_steps.py) keep the traces after the step there.
    by_example |= isinstance(update, dict) and update.keys() == state.traces.keys()
    waiting: PyTree = 0 if by_example else None  # else it is params
    if isinstance(update, Window):
        waiting = Window(None, 0, 1, 1, None)
    return LearnerState(0, traces, Pending(0, 0, waiting, 0), 0)


def state_specs(graph: Graph, state: LearnerState, split: Split) -> LearnerState:
    """How a state is held whose batch is split: a specification for every part, which counts for all of its leaves."""

    def spec(axis: int | None) -> PartitionSpec:
        return EVERYWHERE if axis is None else split.spec(*[None] * axis)

    return jax.tree.map(spec, batch_axes(graph, state), is_leaf=lambda axis: axis is None)


def parts_specs(graph: Graph, state: LearnerState, split: Split, unit: tuple[str, ...]) -> LearnerState:
    """How the state of ``ParameterParts`` is held: traces, and factors that move them, are split along their last axis.

    A device's columns stand there one behind the other; of what it does not share with others each has a copy.
    """
    specs, update = state_specs(graph, state, split), state.pending.update

    def along_columns(spec: PartitionSpec, part: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: PartitionSpec(*spec, *(None,) * (leaf.ndim - 1 - len(spec)), unit), part)

    traces = {}
    for name, trace_ in state.traces.items():
        spec = specs.traces[name]
        if isinstance(trace_, ProjectedCarry):
            columns, factored = (along_columns(a, b) for a, b in zip(spec[:2], trace_[:2], strict=True))
            traces[name] = spec._replace(columns=columns, factored=factored)
        else:
            traces[name] = along_columns(spec, trace_)
    if isinstance(update, list):  # factors
        specs = specs._replace(pending=specs.pending._replace(update=along_columns(split.spec(), update)))
    return specs._replace(traces=traces)


def over_batches(learner: OnlineLearner, graph: Graph) -> OnlineLearner:
    """The learner, whose functions also take batches that are split over explicit axes of a mesh."""

    def specs_of(state: LearnerState, split: Split) -> LearnerState:
        return state_specs(graph, state, split)

    def over(function: Callable[..., PyTree], out_specs: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``out_specs``: what the function gives, from how the state is split, how the rest, and what is no array."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            state = given.get("state")
            seen = [part for name, part in given.items() if name not in ("params", "state")]
            if isinstance(state, LearnerState):
                seen += [state.carry, state.pending.x]
            # What is no state is for the learner to refuse.
            split = split_of(seen) if "state" not in given or isinstance(state, LearnerState) else None
            if split is None:
                return function(**given)
            options = {name: given.pop(name) for name in ("per_example",) if name in given}
            arguments, batch = tuple(given.values()), split.spec()
            held = specs_of(jax.eval_shape(function, *shapes_of(arguments)) if state is None else state, split)
            specs = tuple({"params": EVERYWHERE, "state": held}.get(name, batch) for name in given)
            here = functools.partial(function, **options)
            return split.run(here, arguments, specs, out_specs(held, batch, **options))

        return call

    return learner._replace(
        init=over(learner.init, lambda state, batch: state),
        step=over(learner.step, lambda state, batch: (state, batch)),
        gradient=over(learner.gradient, lambda state, batch, per_example=False: batch if per_example else EVERYWHERE),
        value_and_grad=sequences_over_batches(learner.value_and_grad, learner.network, LearnerState, specs_of),
        reset=over(learner.reset, lambda state, batch: state),
    )


def with_whole_batches(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``function``, which asks every device for all examples: those of a split batch are sent to all devices first."""
    signature = inspect.signature(function)

    def everywhere(leaf: jax.Array) -> jax.Array:
        sharding = _sharding_of(leaf)
        if sharding is None or sharding.is_fully_replicated or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, EVERYWHERE))

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(**jax.tree.map(everywhere, signature.bind(*args, **kwargs).arguments))

    return call


def sequences_over_batches(
    value_and_grad: Callable[..., PyTree], network: Cell, kind: type, specs_of: Callable[..., PyTree]
) -> Callable[..., PyTree]:
    """``value_and_grad`` of a learner, or of BPTT, that also takes batches that are split.

    Args:
      kind: the type of a learner's state; ``object`` where a carry stands in its place.
      specs_of: ``(state, split) -> how the state is split``.
    """

    @functools.wraps(value_and_grad)
    def over(loss_fn, **options):
        plain = value_and_grad(loss_fn, **options)
        has_aux, is_window = options.get("has_aux", False), options.get("window") is not None

        @functools.wraps(plain)
        def run(params, state, xs, targets, resets=None, valid=None):
            carry = state.carry if isinstance(state, LearnerState) else state
            split = split_of((xs, resets, valid), axis=1) or split_of(carry) if isinstance(state, kind) else None
            if split is None:
                return plain(params, state, xs, targets, resets, valid)
            specs, in_time = specs_of(state, split), split.spec(None)
            x = jax.tree.map(lambda leaf: leaf[0], xs)
            _, y = jax.eval_shape(jax.vmap(network.apply, (None, 0, 0)), *shapes_of((params, carry, x)))
            target_specs = None if has_aux or is_window else _target_specs(split, loss_fn, y, targets)
            of_all = _of_all_examples(split, loss_fn, has_aux, batch_axis=1 if is_window else 0)
            loss_here = of_all if target_specs is None else loss_fn
            held, signals_of = arrays_apart(options.get("signals"))

            def part(held, *arguments):
                given = {"signals": signals_of(held)} if held else {}
                (loss, end), grads = value_and_grad(loss_here, **options | given)(*arguments)
                return (_summed(split, loss), end), grads

            if target_specs is None:
                targets, target_specs = (targets, valid), EVERYWHERE
            where = (EVERYWHERE, EVERYWHERE, specs, in_time, target_specs, in_time, in_time)
            arguments = (held, params, state, xs, targets, resets, valid)
            return split.run(part, arguments, where, ((EVERYWHERE, specs), EVERYWHERE))

        return run

    return over


def arrays_apart(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """A pytree's arrays, and how to put them back: ``shard_map`` cannot close over an array of an explicit mesh."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def joined(arrays: list[jax.Array]) -> PyTree:
        found = dict(zip(places, arrays, strict=True))
        return structure.unflatten([found.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], joined


def _sharding_of(leaf: jax.Array) -> NamedSharding | None:
    """An array at hand knows its devices, one that is traced the names of its mesh's axes."""
    found = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _target_specs(split: Split, loss_fn: Callable[..., jax.Array], y: PyTree, targets: PyTree) -> PyTree | None:
    """How targets are split where a device can compute the losses of its own examples; None where it may not.

    Targets that are split along their second axis, that of the batch, are; others are the same on all devices.

    Args:
      y: shapes of the network's output, of the whole batch.
    """

    def spec(leaf: jax.Array) -> PartitionSpec:
        sharding = _sharding_of(leaf)
        found = sharding.spec if sharding is not None else ()
        return split.spec(None) if len(found) > 1 and found[1] in (split.axes, *split.axes) else EVERYWHERE

    specs = jax.tree.map(spec, targets)
    own = [len(spec) > 0 for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))]
    examples = jax.tree.leaves(y)[0].shape[0] // math.prod(split.mesh.shape[name] for name in split.axes)
    return specs if is_per_example(loss_fn, y, shapes_of(targets, 1), own, examples) else None


def _of_all_examples(
    split: Split, loss_fn: Callable[..., PyTree], has_aux: bool, batch_axis: int
) -> Callable[..., PyTree]:
    """The loss of the whole batch as a function of a device's outputs; its value counts on the first device alone."""

    def loss_here(y: PyTree, target_and_valid: tuple[PyTree, jax.Array | None]) -> PyTree:
        target, valid = target_and_valid
        number = jax.lax.axis_index(split.axes)

        def everyone(own: jax.Array) -> jax.Array:
            gathered = jax.lax.all_gather(jax.lax.stop_gradient(own), split.axes, axis=batch_axis, tiled=True)
            start = number * own.shape[batch_axis]
            return jax.lax.dynamic_update_slice_in_dim(gathered, own, start, batch_axis)

        found = loss_fn(jax.tree.map(everyone, y), target)
        loss, aux = found if has_aux else (found, None)
        if loss.ndim:  # one per example, each of which may depend on the outputs of all
            loss = (loss if valid is None else jnp.where(valid, loss, 0)).sum()
        loss = jnp.where(number == 0, loss, loss - jax.lax.stop_gradient(loss))
        first = jax.tree.map(lambda leaf: jnp.where(number == 0, leaf, jnp.zeros_like(leaf)), aux)
        return (loss, first) if has_aux else loss

    return loss_here


def _summed(split: Split, tree: PyTree) -> PyTree:
    """Over the devices; what is false or true counts as true where any is."""

    def total(leaf: jax.Array) -> jax.Array:
        found = jax.lax.psum(leaf.astype(jnp.int32) if leaf.dtype == bool else leaf, split.axes)
        return found.astype(leaf.dtype)

    return jax.tree.map(total, tree)
