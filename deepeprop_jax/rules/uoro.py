"""UORO: an unbiased estimate of the influence of all parameters on the carry, of rank one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.rules.by_steps import Recursion, by_steps
from deepeprop_jax.rules.flat import flat_step, pushed, square_root_of_ratio
from deepeprop_jax.traces.plan import Plan

Memory = tuple[jax.Array, jax.Array]
"""s (n,) and theta_bar (|θ|,), whose product s theta_barᵀ has the influence ∂h/∂θ as its mean."""


def uoro(network: object) -> OnlineLearner:
    """Unbiased online recurrent optimisation: the influence on the carry is kept as one outer product, by random signs.

        s_t          =  ρ0 · D_t s_{t-1}   +  ρ1 · ν_t                  D_t = ∂h_t/∂h_{t-1}, ν_t random signs
        theta_bar_t  =  theta_bar_{t-1} / ρ0  +  ν_tᵀ ∂F/∂θ / ρ1
        gradient_t   =  (∂L_t/∂h_{t-1} · s_{t-1}) theta_bar_{t-1}  +  ∂L_t/∂θ

        ρ0 = sqrt(‖theta_bar_{t-1}‖ / ‖D_t s_{t-1}‖)        ρ1 = sqrt(‖ν_tᵀ ∂F/∂θ‖ / ‖ν_t‖)

    The whole network is one recursion h_t = F(θ, h_{t-1}, x_t), over all of its carries; ∂L_t/∂h_{t-1} and ∂L_t/∂θ go
    through step t alone. Every example has its own signs. The paper adds a small number to norms in ρ; here ρ is 1
    where a norm is zero. Any positive ρ leaves the mean as it is.

    *Unbiased*: the mean over signs is BPTT's gradient. Its variance grows with the number of parameters and units.

    *Cost* per step and example: three backward passes through one step, and one forward; n + |θ| numbers.

    Args:
      network: as ``deep_eprop`` takes it.

    Returns:
      An ``OnlineLearner`` whose ``init(params, carry, x, key)`` takes the key of the signs; without one it is always
      ``jax.random.key(0)``, so that every sequence has the same signs. ``value_and_grad`` goes step by step.

    Reference: C. Tallec, Y. Ollivier, "Unbiased Online Recurrent Optimization" (arXiv:1702.05043), algorithm 1.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> learner = uoro(nn.GRUCell(features=4))
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2))
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0], jax.random.key(1)), xs, jnp.zeros(6))
    """
    return by_steps(network, _rule, uoro)


def _rule(cell: Cell) -> Recursion:
    def first(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Memory:
        flat = flat_step(cell, params, carry, x)
        return jnp.zeros_like(flat.h_tm1), jnp.zeros_like(flat.theta)

    def move(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree, memory: Memory, key: jax.Array) -> Memory:
        s, theta_bar = memory
        flat = flat_step(cell, params, carry_tm1, x)
        signs = jax.random.rademacher(key, s.shape, s.dtype)
        _, pull = jax.vjp(lambda theta: flat.next_carry(theta, flat.h_tm1), flat.theta)
        (d_theta,) = pull(signs)
        forward = pushed(lambda h: flat.next_carry(flat.theta, h), flat.h_tm1, s)
        rho_0, rho_1 = square_root_of_ratio(theta_bar, forward), square_root_of_ratio(d_theta, signs)
        return rho_0 * forward + rho_1 * signs, theta_bar / rho_0 + d_theta / rho_1

    def gradient(plan: Plan, params, carry_tm1, x, memory_tm1: Memory, memory_t: Memory, dy: jax.Array) -> jax.Array:
        s, theta_bar = memory_tm1
        flat = flat_step(cell, params, carry_tm1, x)
        _, pull = jax.vjp(flat.output, flat.theta, flat.h_tm1)
        d_theta, d_h = pull(dy)
        return jnp.dot(d_h, s) * theta_bar + d_theta

    return Recursion(first, move, gradient, draws=True)
