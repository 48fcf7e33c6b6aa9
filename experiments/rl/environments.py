"""What an environment is: two pure functions, of one environment; ``jax.vmap`` makes several.

An episode ends by itself (``terminated``: nothing comes after, its value is 0) or is cut by a time limit
(``truncated``: it would have gone on, and its value is still that of its last observation). In both cases the next one
begins at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Transition(NamedTuple):
    """What an action led to.

    Attributes:
      state: of the environment; of a new episode where one has ended.
      observation: (size,), what the next action is chosen on.
      reward: a real number.
      terminated, truncated: whether the episode is over, and how.
      last: (size,), the observation that the action led to: where an episode has ended its own last one, else
        ``observation``.
    """

    state: PyTree
    observation: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    last: jax.Array


class Environment(NamedTuple):
    """An environment that goes on for ever, episode after episode.

    Attributes:
      begin: ``begin(key) -> (state, observation)``.
      step: ``step(key, state, action) -> Transition``; action is an integer from 0.
      actions: how many there are.
      best: an episode's return by the best policy, or the largest that an episode can have.
      chance: that by a policy that sees nothing of what it should remember; for tables and pictures.
    """

    begin: Callable[[jax.Array], tuple[PyTree, jax.Array]]
    step: Callable[[jax.Array, PyTree, jax.Array], Transition]
    actions: int
    best: float
    chance: float


class Moved(NamedTuple):
    """What an action led to, before anything begins anew; as in ``Transition``."""

    state: PyTree
    observation: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array


def in_episodes(
    begin: Callable[[jax.Array], tuple[PyTree, jax.Array]],
    move: Callable[[jax.Array, PyTree, jax.Array], Moved],
    **about: Any,
) -> Environment:
    """The environment that begins anew wherever ``move(key, state, action)`` ends an episode."""

    def step(key: jax.Array, state: PyTree, action: jax.Array) -> Transition:
        move_key, begin_key = jax.random.split(key)
        moved = move(move_key, state, action)
        ended = moved.terminated | moved.truncated
        after = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old), begin(begin_key), (moved.state, moved.observation)
        )
        return Transition(*after, moved.reward, moved.terminated, moved.truncated, moved.observation)

    return Environment(begin, step, **about)
