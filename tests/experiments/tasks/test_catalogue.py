"""The tasks by name: network, data and loss of each fit together, and each has a configuration."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments.tasks.catalogue import TASKS, bits_right
from experiments.training import settings
from experiments.training.loop import Loop


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.usefixtures("recordings")
def test_every_task_has_a_configuration_with_which_it_trains(name):
    """Network, data and loss fit together; shapes alone, nothing is compiled."""
    setting = settings.make(settings.read([f"--config=configs/{name}.py"])[0])
    loop = Loop(setting.task, setting.rule, setting.optimiser, setting.update_every, setting.config.evaluate_every)
    learning = jax.eval_shape(loop.start, jax.random.key(0))
    after, loss = jax.eval_shape(loop.advance, learning, jax.random.key(0), 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, learning)
    chex.assert_rank(loss, 0)
    xs, targets = jax.eval_shape(lambda: setting.task.sample(jax.random.key(0), 0))
    test_xs, test_targets = jax.eval_shape(setting.task.test)
    assert test_xs.shape[2:] == xs.shape[2:]
    assert setting.task.continues or len(test_xs) == len(xs)
    assert test_targets.label.shape[2:] == targets.label.shape[2:]


def test_the_share_of_right_bits():
    logits, label = jnp.array([[[1.0, -2.0, 3.0, -4.0]]]), jnp.array([[[1, 0, 0, 1]]])
    assert float(bits_right(logits, label)[0, 0]) == 0.5
