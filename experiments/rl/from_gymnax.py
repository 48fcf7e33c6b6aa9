"""Any environment of gymnax (R. T. Lange, version 1.0 and later) with discrete actions as an ``Environment``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.program.refusal import Refused
from experiments.rl.environments import Environment, Transition

INSTALL = "pip install -e '.[rl]'"


def from_gymnax(
    name: str,
    best: float,
    chance: float = 0.0,
    seen: Iterable[int] | None = None,
    params: Mapping[str, Any] | None = None,
) -> Environment:
    """The environment of that name; it begins anew by itself, as ours do.

    Args:
      name: such as "CartPole-v1" or "MemoryChain-bsuite".
      best, chance: see ``Environment``.
      seen: which numbers of the observation are shown, to mask the others; None for all.
      params: fields of the environment's parameters that are not at their defaults.

    Raises:
      Refused: gymnax is not installed, or older than 1.0; a name that it does not have; actions that are not discrete.
    """
    try:
        gymnax = importlib.import_module("gymnax")
    except ImportError as error:
        raise Refused(f"{name} is an environment of gymnax, which is not installed ({error}): {INSTALL}") from error
    try:
        environment, defaults = gymnax.make(name)
    except ValueError as error:
        raise Refused(f"gymnax has no environment {name!r}: {error}") from error
    constants = defaults.replace(**params) if params else defaults
    space = environment.action_space(constants)
    if not hasattr(space, "n"):
        raise Refused(f"{name} has no discrete actions; seen {type(space).__name__}. The actor chooses one of several.")
    shown = None if seen is None else jnp.asarray(list(seen))

    def observe(observation: jax.Array) -> jax.Array:
        numbers = jnp.ravel(observation).astype(jnp.float32)
        return numbers if shown is None else numbers[shown]

    def begin(key: jax.Array) -> tuple[Any, jax.Array]:
        observation, state = environment.reset(key, constants)
        return state, observe(observation)

    def step(key: jax.Array, state: Any, action: jax.Array) -> Transition:
        result = environment.step(key, state, action, constants)
        if len(result) != 6:
            raise Refused(
                f"Seen a step of {len(result)} results; needed gymnax 1.0 or later, which tells the end of an episode "
                f"from its time limit. {INSTALL}"
            )
        observation, after, reward, terminated, truncated, info = result
        terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        reward = jnp.asarray(reward, jnp.float32)
        last = observe(info["final_observation"])
        return Transition(after, observe(observation), reward, terminated, truncated & ~terminated, last)

    return Environment(begin, step, int(space.n), best, chance)
