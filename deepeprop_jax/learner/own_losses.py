"""What a device may compute from its own examples: losses, auxiliary outputs and signals, one per example.

Which leaves of the targets belong to examples cannot be seen from their shapes alone, (time, batch) being also (time,
as many classes). It is proven from the loss: with those leaves split an example's loss needs its own part of them only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.per_example import is_per_example
from deepeprop_jax.network.arguments import leaf_avals, path_name, shapes_of
from deepeprop_jax.network.cell import PyTree

REMEDY = (
    "Return one loss per example, (batch,): without .mean() or .sum(), divided by the number of examples where a mean "
    "is wanted. A loss that needs other examples takes batches over a mesh with explicit axes, without data_parallel: "
    "the learner then gathers the outputs once a segment."
)


class Step(NamedTuple):
    """One step of the whole batch, in shapes.

    Attributes:
      y: the network's output, (batch, ...).
      target: of one step.
      batch: number of examples.
      examples: how many of them a device has.
    """

    y: PyTree
    target: PyTree
    batch: int
    examples: int


def split_targets(
    loss_fn: Callable[..., PyTree], has_aux: bool, signals: Mapping[str, Callable] | None, step: Step
) -> list[bool]:
    """Per leaf of the targets, whether it is split as the batch is: its second axis, (time, batch, ...).

    Raises:
      ValueError: a scalar loss; losses, auxiliary outputs or signals that are not, or cannot be seen to be, each a
        function of one example alone.
    """
    found = jax.eval_shape(loss_fn, step.y, step.target)
    loss, aux = found if has_aux else (found, None)
    shape = getattr(loss, "shape", None)
    if shape == ():
        raise ValueError(
            f"loss_fn gives one number for all {step.batch} examples, of which a device has {step.examples}: the loss "
            f"of a part, a mean say, is not its part of the loss. {REMEDY}"
        )
    if shape != (step.batch,):
        raise ValueError(f"loss_fn must give one loss per example, ({step.batch},); seen {shape}. {REMEDY}")
    own = _own_leaves(lambda y, t: loss_fn(y, t)[0] if has_aux else loss_fn(y, t), step)
    if own is None:
        raise ValueError(
            f"loss_fn gives one loss per example, but each may need other examples than its own, or it cannot be seen "
            f"that it does not; the targets of a step have the shapes {[leaf.shape for leaf in _leaves(step.target)]}. "
            f"{REMEDY}"
        )
    _check_aux(loss_fn, aux, own, step)
    for name, signal in (signals or {}).items():
        given = jax.eval_shape(signal, step.y, step.target)
        if not _each_alone(lambda y, t, s=signal: _per_example(s(y, t), step), given, own, step):
            raise ValueError(
                f"signals[{name!r}] must give each example what depends on that example alone, (batch, ...); it does "
                f"not, or cannot be seen to."
            )
    return own


def _leaves(tree: PyTree) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(tree)


def _own_leaves(losses: Callable[..., jax.Array], step: Step) -> list[bool] | None:
    """All leaves whose first axis is as long as the batch, if that can be proven; else none; else nothing is."""
    like_batch = [leaf.shape[:1] == (step.batch,) for leaf in _leaves(step.target)]
    for own in (like_batch, [False] * len(like_batch)):
        if is_per_example(losses, step.y, step.target, own, step.examples):
            return own
    return None


def _check_aux(loss_fn: Callable[..., PyTree], aux: PyTree, own: Sequence[bool], step: Step) -> None:
    for number, (path, leaf) in enumerate(leaf_avals(aux)):

        def part(y: PyTree, target: PyTree, number: int = number) -> jax.Array:
            return _per_example(jax.tree.leaves(loss_fn(y, target)[1])[number], step)

        if not _each_alone(part, leaf, own, step):
            raise ValueError(
                f"the auxiliary output at '{path_name(path)}' has shape {leaf.shape} for a batch of {step.batch}; "
                f"needed (batch, ...), each example's part from that example alone. Return it per example and take the "
                f"mean of what comes back, (time, batch, ...)."
            )


def _each_alone(function: Callable[..., jax.Array], leaf: PyTree, own: Sequence[bool], step: Step) -> bool:
    shaped = all(part.shape[:1] == (step.batch,) for part in _leaves(leaf))
    return shaped and is_per_example(function, step.y, step.target, own, step.examples)


def _per_example(tree: PyTree, step: Step) -> jax.Array:
    """One real number per example, which changes with each of the tree's."""

    def total(leaf: jax.Array) -> jax.Array:
        flat = leaf.reshape(leaf.shape[0], -1)
        flat = flat.real + flat.imag if jnp.iscomplexobj(leaf) else flat
        return flat.astype(jnp.float32).sum(axis=1)

    return sum(map(total, jax.tree.leaves(tree)[1:]), start=total(jax.tree.leaves(tree)[0]))


def step_of(y: PyTree, targets: PyTree, batch: int, devices: int) -> Step:
    """A step's shapes, from those of the output and of targets with an axis of time."""
    return Step(y, shapes_of(targets, 1), batch, batch // devices)
