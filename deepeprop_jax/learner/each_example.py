"""A function of a state's examples, each of them as a batch of one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepeprop_jax.learner.contract import LearnerState
from deepeprop_jax.network.cell import PyTree


def of_each_example(
    function: Callable[..., PyTree], axes: LearnerState, state: LearnerState, *others: PyTree
) -> PyTree:
    """``function(state, *others)`` of batches of one, one for each example: all of its arrays have a batch axis first.

    Args:
      axes: the number of the batch's axis in all arrays of the state, as a prefix of it; None where there is none. Of
        ``others`` the batch is the first axis.
    """

    def alone(state: LearnerState, *others: PyTree) -> PyTree:
        return function(_with_axes(axes, state), *_with_axes(0, others))

    return jax.vmap(alone, in_axes=(axes, *(0 for _ in others)))(state, *others)


def _with_axes(axes: PyTree, tree: PyTree) -> PyTree:
    """Arrays with an axis of size one in each of these places."""

    def expand(axis: int | None, part: PyTree) -> PyTree:
        return part if axis is None else jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axis), part)

    return jax.tree.map(expand, axes, tree, is_leaf=lambda axis: axis is None)
