"""Immediate credit: through one step alone."""

from __future__ import annotations

import jax

from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.rules.by_steps import Recursion, by_steps
from deepeprop_jax.rules.flat import flat_step
from deepeprop_jax.traces.plan import Plan


def immediate(network: object) -> OnlineLearner:
    """Credit through the step that the loss stands at, and none through the carry that enters it.

        gradient_t  =  ∂L_t/∂y_t · ∂y_t/∂θ          with h_{t-1} a constant

    It keeps nothing but the carry, and has the gradient of truncated BPTT with chunks of one step.

    *Exact when* no parameter reaches a later step through the carry.

    *Cost* per step: one backward pass through one step; no memory.

    Args:
      network: as ``deep_eprop`` takes it.

    Returns:
      An ``OnlineLearner``. Its ``value_and_grad`` goes step by step.

    Reference: Merin 2026 (arXiv:2603.28750), where the optimiser is RMSprop. The optimiser is the user's:
    ``optax.rmsprop``.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> learner = immediate(nn.GRUCell(features=4))
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2))
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(6))
    """
    return by_steps(network, _rule, immediate)


def _rule(cell: Cell) -> Recursion:
    def first(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> tuple:
        return ()

    def move(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree, memory: tuple, key: None) -> tuple:
        return ()

    def gradient(plan: Plan, params, carry_tm1, x, memory_tm1: tuple, memory_t: tuple, dy: jax.Array) -> jax.Array:
        flat = flat_step(cell, params, carry_tm1, x)
        _, pull = jax.vjp(lambda theta: flat.output(theta, flat.h_tm1), flat.theta)
        return pull(dy)[0]

    return Recursion(first, move, gradient)
