"""What is measured of a network on a task, as functions to compile: right answers and loss, and a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.tasks.catalogue import Task
from experiments.tasks.targets import Targets
from experiments.training.rules import Rule

PyTree = Any


def silence(task: Task) -> jax.Array:
    """One step's input of a training batch, all zeros."""
    xs, _ = jax.eval_shape(lambda: task.sample(jax.random.key(0), 0))
    return jnp.zeros(xs.shape[1:], xs.dtype)


def initial_carry(task: Task, x: jax.Array) -> PyTree:
    """The network's carry before the first step, which does not depend on a key."""
    return task.network.init(jax.random.key(0), x)[1]


def on_test_set(task: Task, params: PyTree, xs: PyTree, targets: Targets) -> tuple[jax.Array, jax.Array]:
    """The share of right answers, steps weighted as in the loss, and the loss of a sequence."""
    apply = jax.vmap(task.network.apply, in_axes=(None, 0, 0))

    def step(carry: PyTree, at: tuple) -> tuple[PyTree, tuple[PyTree, jax.Array]]:
        x, target = at
        carry, y = apply(params, carry, x)
        return carry, (y, task.loss_fn(y, target))

    _, (outputs, losses) = jax.lax.scan(step, initial_carry(task, xs[0]), (xs, targets))
    right = task.right(outputs, targets.label)
    return jnp.sum(right * targets.weight) / jnp.sum(targets.weight), losses.sum()


def gradient(task: Task, rule: Rule, params: PyTree, key: jax.Array, index: jax.Array, kept: PyTree = None) -> PyTree:
    """A rule's gradient of a whole training batch, from the initial carry, without traces, with what it has kept."""
    return rule.gradient(params, initial_carry(task, silence(task)), *task.sample(key, index), kept)[1]
