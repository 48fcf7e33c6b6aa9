"""Cart-pole without its velocities: a pole on a cart is kept upright by pushes to the left and to the right.

    x'' and θ'' as in Barto, Sutton and Anderson (1983), eq. of the appendix, without friction
    x ← x + τ x'      x' ← x' + τ x''      θ ← θ + τ θ'      θ' ← θ' + τ θ''          τ = 0.02 s

*Observation*: (x / 2.4, θ / 12°), two numbers from -1 to 1. The velocities, which are needed, must be found from the
past. *Actions*: 0 pushes with -10 N, 1 with +10 N. *Reward*: 1 at every step. An episode terminates where |x| > 2.4 m
or |θ| > 12°, and is cut after ``limit`` steps; it starts with all four numbers of the state uniform in (-0.05, 0.05).
Largest return: ``limit``.

Constants and integration are those of Gym's CartPole-v1 (G. Brockman et al., arXiv:1606.01540). Without velocities it
is a standard task of memory in control (as in POPGym: S. Morad et al., ICLR 2023, "stateless cartpole").
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from experiments.rl.environments import Environment, Moved, in_episodes
from experiments.tasks.arguments import check_at_least

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FURTHEST, STEEPEST = 2.4, math.radians(12)

State = tuple[jax.Array, jax.Array]
"""(x, x', θ, θ'), and the steps so far."""


def accelerated(body: jax.Array, action: jax.Array) -> jax.Array:
    """(x, x', θ, θ') one step later."""
    _, speed, angle, turning = body
    force = jnp.where(action == 1, FORCE, -FORCE)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pushed = (force + POLE * HALF_LENGTH * turning**2 * sine) / (CART + POLE)
    swing = (GRAVITY * sine - cosine * pushed) / (HALF_LENGTH * (4 / 3 - POLE * cosine**2 / (CART + POLE)))
    drive = pushed - POLE * HALF_LENGTH * swing * cosine / (CART + POLE)
    return body + TAU * jnp.stack([speed, drive, turning, swing])


def masked_cart_pole(limit: int = 500) -> Environment:
    """Cart-pole of which position and angle alone are seen, in episodes of ``limit`` steps at most.

    Raises:
      ValueError: a limit below 1.
    """
    check_at_least(1, limit=limit)

    def observe(body: jax.Array) -> jax.Array:
        return jnp.stack([body[0] / FURTHEST, body[2] / STEEPEST])

    def begin(key: jax.Array) -> tuple[State, jax.Array]:
        body = jax.random.uniform(key, (4,), jnp.float32, -0.05, 0.05)
        return (body, jnp.zeros((), jnp.int32)), observe(body)

    def move(key: jax.Array, state: State, action: jax.Array) -> Moved:
        body, steps = accelerated(state[0], action), state[1] + 1
        fallen = (jnp.abs(body[0]) > FURTHEST) | (jnp.abs(body[2]) > STEEPEST)
        return Moved((body, steps), observe(body), jnp.ones((), body.dtype), fallen, (steps >= limit) & ~fallen)

    return in_episodes(begin, move, actions=2, best=float(limit), chance=0.0)
