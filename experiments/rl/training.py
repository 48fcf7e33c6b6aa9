"""One rule on one task: several seeds at once, in calls of some thousand steps each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.rl.actor_critic import ActorCritic, Agent, Numbers
from experiments.rl.cart_pole import masked_cart_pole
from experiments.rl.environments import Environment
from experiments.rl.from_gymnax import from_gymnax
from experiments.rl.memory_chain import memory_chain
from experiments.rl.networks import two_layers
from experiments.rl.rules import RULES

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "memory_chain": memory_chain,
    "masked_cart_pole": masked_cart_pole,
    "gymnax": from_gymnax,
}


class Record(NamedTuple):
    """What is known after some steps; arrays have one entry per seed.

    Attributes:
      step: steps of the environment, and updates, so far.
      returned: mean return of the episodes that ended since the record before, by the policy as it learns; nan where
        none has ended.
      episodes: how many these were.
      entropy: of the policy, in nats, mean over these steps.
    """

    step: int
    returned: np.ndarray
    episodes: np.ndarray
    entropy: np.ndarray


def make_environment(task: ml_collections.ConfigDict) -> Environment:
    """That of a task.

    Raises:
      Refused: it is gymnax's, which is not installed.
    """
    return ENVIRONMENTS[task.environment](**task.options)


def optimiser_of(config: ml_collections.ConfigDict, task: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """RMSprop whose update is cut at the learning rate, number by number; the rate falls linearly to a tenth.

    δ is large once in an episode and small else. Divided by the root of a mean over a thousand steps, a rare gradient
    would move a parameter by many times the learning rate, and such steps end learning for good.
    """
    highest = task.get("learning_rate", config.learning_rate)
    rate = optax.linear_schedule(highest, highest / 10, task.steps)
    return optax.chain(
        optax.scale_by_rms(config.rms_decay, bias_correction=True), optax.clip(1.0), optax.scale_by_learning_rate(rate)
    )


def make_actor_critic(config: ml_collections.ConfigDict, task: ml_collections.ConfigDict, rule: str) -> ActorCritic:
    """Everything but the seed."""
    environment = make_environment(task)
    numbers = Numbers(**{**config.numbers, **task.numbers})
    network = two_layers(environment.actions, **{**config.network, **task.get("network", {})})
    return ActorCritic(network, RULES[rule], environment, optimiser_of(config, task), numbers)


def summary(actor_critic: ActorCritic, steps: int) -> Callable[[Agent], tuple[Agent, tuple[jax.Array, ...]]]:
    """``advance`` of several agents, and of each the three figures of a ``Record``."""

    def one(agent: Agent) -> tuple[Agent, tuple[jax.Array, ...]]:
        agent, seen = actor_critic.advance(agent, steps)
        episodes = seen.ended.sum()
        returned = jnp.where(seen.ended, seen.returned, 0).sum() / episodes
        return agent, (returned, episodes, seen.entropy.mean())

    return jax.jit(jax.vmap(one))


def records(config: ml_collections.ConfigDict, task: ml_collections.ConfigDict, rule: str) -> Iterator[Record]:
    """Train all seeds side by side, and report after every ``report_every`` steps."""
    actor_critic = make_actor_critic(config, task, rule)
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
    agents: Any = jax.jit(jax.vmap(actor_critic.start))(keys)
    advance = summary(actor_critic, task.report_every)
    for step in range(task.report_every, task.steps + 1, task.report_every):
        agents, figures = advance(agents)
        yield Record(step, *map(np.asarray, figures))
