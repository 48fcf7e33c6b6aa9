"""TBPTT(1): the gradient through one step alone, with the learner's functions that a stream needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax import Cell, LearnerState
from deepeprop_jax.learner.contract import Pending

PyTree = Any


class OneStep(NamedTuple):
    """Backpropagation through the last step, with the carry that enters it a constant. It has no traces.

    The same gradient as that of ``deepeprop_jax.rules.immediate``, by one VJP of the network, which compiles to less.

    Attributes:
      network: see ``OnlineLearner``, as for the functions.
    """

    network: Cell

    def init(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        """See ``OnlineLearner``; the state has the carry alone."""
        pending = Pending(carry, jnp.zeros_like(x), (), jnp.zeros(x.shape[0], bool))
        return LearnerState(carry, {}, pending, carry)

    def step(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        """See ``OnlineLearner``."""
        carry, y = jax.vmap(self.network.apply, (None, 0, 0))(params, state.carry, x)
        pending = Pending(state.carry, x, (), jnp.ones(x.shape[0], bool))
        return state._replace(carry=carry, pending=pending), y

    def gradient(self, params: PyTree, state: LearnerState, dy: PyTree) -> PyTree:
        """See ``OnlineLearner``."""

        def output(params: PyTree) -> PyTree:
            return jax.vmap(self.network.apply, (None, 0, 0))(params, state.pending.carry, state.pending.x)[1]

        return jax.vjp(output, params)[1](dy)[0]

    def reset(self, state: LearnerState, where: jax.Array) -> LearnerState:
        """See ``OnlineLearner``."""

        def kept(first: jax.Array, leaf: jax.Array) -> jax.Array:
            return jnp.where(where.reshape(-1, *(1,) * (leaf.ndim - 1)), first, leaf)

        return state._replace(carry=jax.tree.map(kept, state.initial_carry, state.carry))
