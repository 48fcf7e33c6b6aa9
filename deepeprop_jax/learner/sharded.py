"""Batches that are split over a mesh with explicit axes: every device runs the learner on its own examples.

JAX then holds in an array's type how it is split, and refuses what would move examples between devices. Nothing here
moves them: the learner's functions run under ``jax.shard_map`` over the axes that split the batch. Gradients and losses
are summed in one ``psum`` at the end. A loss per example is computed where the example is, if it needs nothing of the
others (see ``per_example``); of any other loss every device computes all, from outputs gathered once per segment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepeprop_jax.analysis.per_example import is_per_example
from deepeprop_jax.learner.contract import (
    Gradient,
    Init,
    LearnerState,
    OnlineLearner,
    Pending,
    Reset,
    Step,
    documented_by,
)
from deepeprop_jax.network.cell import Cell, Graph, PyTree

EVERYWHERE = PartitionSpec()
"""The same on all devices."""


class Split(NamedTuple):
    """How a batch is split: over which axes of which mesh."""

    mesh: Any
    axes: tuple[str, ...]

    def spec(self, *before: None) -> PartitionSpec:
        """Of an array whose batch axis has these axes before it."""
        return PartitionSpec(*before, self.axes)

    def place(self, tree: PyTree, specs: PyTree) -> PyTree:
        """The same arrays, split as ``specs``, a prefix of the pytree, say."""

        def move(spec: PartitionSpec, part: PyTree) -> PyTree:
            held = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda leaf: jax.sharding.reshard(jnp.asarray(leaf), held), part)

        return jax.tree.map(move, specs, tree)

    def run(self, function: Callable, arguments: tuple, specs: tuple, out_specs: Any) -> Any:
        """``function`` of the part of every argument that a device has; ``specs`` and ``out_specs`` may be prefixes."""
        over = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=out_specs, axis_names=frozenset(self.axes)
        )
        return over(*(self.place(a, s) for a, s in zip(arguments, specs, strict=True)))


def split_of(trees: PyTree, axis: int = 0) -> Split | None:
    """How the batch is split, the axis number ``axis`` of every leaf; None where it is not, or not explicitly.

    Raises:
      ValueError: leaves that are split differently, or along other axes than the batch's.
    """
    found: dict[Split, Any] = {}
    for leaf in jax.tree.leaves(trees):
        sharding = _sharding_of(leaf)
        if sharding is None:
            continue
        explicit = {name for name, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
                    if kind == AxisType.Explicit}  # fmt: skip
        named = [() if part is None else part if isinstance(part, tuple) else (part,) for part in sharding.spec]
        named = [tuple(name for name in part if name in explicit) for part in named]
        others = [part for place, part in enumerate(named) if place != axis and part]
        if others:
            raise ValueError(
                f"Of a learner's arrays only the batch axis may be split over a mesh; seen {jax.typeof(leaf)}, split "
                f"as {sharding.spec}. Bring the other axes together with jax.sharding.reshard."
            )
        if len(named) > axis and named[axis]:
            found[Split(sharding.mesh, named[axis])] = leaf
    if len(found) > 1 and len({(split.axes, split.mesh.axis_names) for split in found}) > 1:
        raise ValueError(
            f"All arrays of a batch must be split over the same axes of one mesh; seen "
            f"{', '.join(str(split.axes) for split in found)}. Use jax.sharding.reshard."
        )
    return next(iter(found), None)


def over_batches(learner: OnlineLearner, graph: Graph, factors: type) -> OnlineLearner:
    """The learner, whose functions also take batches that are split over explicit axes of a mesh.

    Args:
      factors: the type of what waits in ``Pending.update`` per node, where it has a batch axis.
    """

    def specs_of(state: LearnerState, split: Split) -> LearnerState:
        batch = split.spec()
        deep = {vertex.name for vertex in graph.nodes if vertex.depth is not None}
        traces = {name: split.spec(None) if name.partition(" <- ")[0] in deep else batch for name in state.traces}
        update = state.pending.update
        by_example = isinstance(update, list) and all(isinstance(part, factors) for part in update)
        pending = Pending(batch, batch, batch if by_example else EVERYWHERE, batch)
        return LearnerState(batch, traces, pending, batch)

    @documented_by(Init)
    def init(params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        split = split_of((carry, x))
        if split is None:
            return learner.init(params, carry, x)
        specs = specs_of(jax.eval_shape(learner.init, *_shapes((params, carry, x))), split)
        return split.run(learner.init, (params, carry, x), (EVERYWHERE, split.spec(), split.spec()), specs)

    @documented_by(Step)
    def step(params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        split = _split_of_state(state, x)
        if split is None:
            return learner.step(params, state, x)
        specs = specs_of(state, split)
        out_specs = (specs, split.spec())
        return split.run(learner.step, (params, state, x), (EVERYWHERE, specs, split.spec()), out_specs)

    @documented_by(Gradient)
    def gradient(params: PyTree, state: LearnerState, dy: PyTree) -> PyTree:
        split = _split_of_state(state, dy)
        if split is None:
            return learner.gradient(params, state, dy)
        specs = (EVERYWHERE, specs_of(state, split), split.spec())
        return split.run(learner.gradient, (params, state, dy), specs, EVERYWHERE)

    @documented_by(Reset)
    def reset(state: LearnerState, where: jax.Array) -> LearnerState:
        split = _split_of_state(state, where)
        if split is None:
            return learner.reset(state, where)
        specs = specs_of(state, split)
        return split.run(learner.reset, (state, where), (specs, split.spec()), specs)

    value_and_grad = sequences_over_batches(learner.value_and_grad, learner.network, LearnerState, specs_of)
    return learner._replace(init=init, step=step, gradient=gradient, value_and_grad=value_and_grad, reset=reset)


def sequences_over_batches(value_and_grad: Callable, network: Cell, kind: type, specs_of: Callable) -> Callable:
    """``value_and_grad`` of a learner, or of BPTT, that also takes batches that are split.

    Args:
      kind: the type of a learner's state; ``object`` where a carry stands in its place.
      specs_of: ``(state, split) -> how the state is split``.
    """

    @functools.wraps(value_and_grad)
    def over(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        plain = value_and_grad(loss_fn, **options)
        has_aux = options.get("has_aux", False)

        @functools.wraps(plain)
        def run(params, state, xs, targets, resets=None, valid=None):
            carry = state.carry if isinstance(state, LearnerState) else state
            split = split_of((xs, resets, valid), axis=1) or split_of(carry) if isinstance(state, kind) else None
            if split is None:
                return plain(params, state, xs, targets, resets, valid)
            specs, in_time = specs_of(state, split), split.spec(None)
            x = jax.tree.map(lambda leaf: leaf[0], xs)
            _, y = jax.eval_shape(jax.vmap(network.apply, (None, 0, 0)), *_shapes((params, carry, x)))
            target_specs = None if has_aux else _target_specs(split, loss_fn, y, targets)
            loss_here = _of_all_examples(split, loss_fn, has_aux) if target_specs is None else loss_fn
            here = value_and_grad(loss_here, **options)

            def part(*arguments: Any) -> tuple:
                (loss, end), grads = here(*arguments)
                return (_summed(split, loss), end), grads

            if target_specs is None:
                targets, target_specs = (targets, valid), EVERYWHERE
            where = (EVERYWHERE, specs, in_time, target_specs, in_time, in_time)
            arguments = (params, state, xs, targets, resets, valid)
            return split.run(part, arguments, where, ((EVERYWHERE, specs), EVERYWHERE))

        return run

    return over


def _split_of_state(state: Any, others: PyTree) -> Split | None:
    """What is no state is for the learner to refuse."""
    return split_of((state.carry, state.pending.x, others)) if isinstance(state, LearnerState) else None


def _sharding_of(leaf: Any) -> NamedSharding | None:
    """An array at hand knows its devices, one that is traced the names of its mesh's axes."""
    found = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def _target_specs(split: Split, loss_fn: Callable, y: PyTree, targets: PyTree) -> PyTree | None:
    """How targets are split where a device can compute the losses of its own examples; None where it may not.

    Targets that are split along their second axis, that of the batch, are; others are the same on all devices.

    Args:
      y: shapes of the network's output, of the whole batch.
    """
    devices = 1
    for name in split.axes:
        devices *= split.mesh.shape[name]

    def spec(leaf: Any) -> PartitionSpec:
        sharding = _sharding_of(leaf)
        found = sharding.spec if sharding is not None else ()
        return split.spec(None) if len(found) > 1 and found[1] in (split.axes, *split.axes) else EVERYWHERE

    specs = jax.tree.map(spec, targets)
    own = [len(spec) > 0 for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))]
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), targets)
    examples = jax.tree.leaves(y)[0].shape[0] // devices
    return specs if is_per_example(loss_fn, y, target, own, examples) else None


def _of_all_examples(split: Split, loss_fn: Callable, has_aux: bool) -> Callable:
    """The loss of the whole batch as a function of a device's outputs; its value counts on the first device alone."""

    def loss_here(y: PyTree, target_and_valid: tuple[PyTree, jax.Array | None]) -> Any:
        target, valid = target_and_valid
        number = jax.lax.axis_index(split.axes)

        def everyone(own: jax.Array) -> jax.Array:
            gathered = jax.lax.all_gather(jax.lax.stop_gradient(own), split.axes, tiled=True)
            return jax.lax.dynamic_update_slice_in_dim(gathered, own, number * own.shape[0], 0)

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
