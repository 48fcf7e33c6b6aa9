"""A small task on which no two rules agree by accident."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepeprop_jax import stack
from experiments.tasks.catalogue import Task, independent
from experiments.tasks.targets import Targets

STEPS, BATCH, INPUTS, CLASSES = 12, 3, 2, 2


def dense_task(continues: bool = False) -> Task:
    """Two recurrent layers with cross-talk between units, so that no two rules agree by accident; loss at each step."""
    cells = [nn.SimpleCell(features, param_dtype=jnp.float64) for features in (4, 5)]

    def sample(key: jax.Array) -> tuple[jax.Array, Targets]:
        xs = jax.random.normal(key, (STEPS, BATCH, INPUTS))
        return xs, Targets((xs.sum(-1).cumsum(0) > 0).astype(jnp.int32), jnp.ones((STEPS, BATCH)))

    network = stack(*cells, nn.Dense(CLASSES, param_dtype=jnp.float64))
    return Task(network, independent(sample), lambda: sample(jax.random.key(9)), continues=continues)
