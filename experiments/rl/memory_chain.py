"""Memory chain: a cue at the first step, a corridor, and at its end the question what the cue was.

    step 0             steps 1 to N              step N + 1
    first = 1          signal: noise             query = 1
    signal = ±1                                  right action (1 for +1, 0 for -1): reward +1, else -1

*Observation*: (first, query, signal), three numbers. *Actions*: two; all but the one at the query are without effect
and reward. An episode has N + 2 steps, of which the last one terminates it. Best return 1; chance, without memory, 0.

After "memory length" of bsuite (I. Osband et al., "Behaviour suite for reinforcement learning", ICLR 2020), with two
differences. There the corridor is silent and the time that is left is shown. Here noise, N(0, ``noise``²), stands in
the cue's place at every step of the corridor: what is not told apart at its own step is lost among N noises, and a
network that adds up what it sees, without having learnt what to let in, has a signal-to-noise ratio of 1 / (noise √N).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.rl.environments import Environment, Moved, in_episodes
from experiments.tasks.arguments import check_at_least

State = tuple[jax.Array, jax.Array]
"""The step in the episode, and the cue."""


def memory_chain(length: int = 8, noise: float = 0.5) -> Environment:
    """A chain with a corridor of ``length`` = N steps.

    Raises:
      ValueError: a length below 1, noise below 0.
    """
    check_at_least(1, length=length)
    if not noise >= 0:
        raise ValueError(f"noise is a standard deviation, 0 or more; seen {noise!r}.")

    def observe(step: jax.Array, signal: jax.Array) -> jax.Array:
        return jnp.stack([(step == 0).astype(signal.dtype), (step == length + 1).astype(signal.dtype), signal])

    def begin(key: jax.Array) -> tuple[State, jax.Array]:
        cue = jax.random.rademacher(key, (), jnp.float32)
        start = jnp.zeros((), jnp.int32)
        return (start, cue), observe(start, cue)

    def move(key: jax.Array, state: State, action: jax.Array) -> Moved:
        step, cue = state
        asked = step == length + 1
        right = jnp.where((action == 1) == (cue > 0), 1.0, -1.0)
        reward = jnp.where(asked, right, 0.0).astype(cue.dtype)
        after = step + 1
        signal = jnp.where(after <= length, noise * jax.random.normal(key, (), cue.dtype), 0)
        return Moved((after, cue), observe(after, signal), reward, asked, jnp.zeros((), bool))

    return in_episodes(begin, move, actions=2, best=1.0, chance=0.0)
