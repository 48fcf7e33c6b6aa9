"""The demo's training: one network by one rule, several seeds at once, several updates per compiled call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.tasks.catalogue import Task
from experiments.tasks.targets import cross_entropy
from experiments.training.rules import RULES

PyTree = Any


class Record(NamedTuple):
    """What is known after some updates; arrays have one entry per seed.

    Attributes:
      update: number of updates made.
      accuracy: on the test set, at the last step.
      cosine: of the last update's gradient of the lower layer with that of BPTT, same parameters, same batch.
      norm_ratio: of the same two gradients, rule over BPTT.
    """

    update: int
    accuracy: np.ndarray
    cosine: np.ndarray
    norm_ratio: np.ndarray


class LastUpdate(NamedTuple):
    """The last update's gradient, and what is needed to take that of BPTT in the same place."""

    index: jax.Array
    params: PyTree
    lower_gradient: PyTree


def make_carry(task: Task, batch: int) -> PyTree:
    """The network's initial carry, which does not depend on a seed."""
    xs, _ = jax.eval_shape(task.sample, jax.random.key(0), 0)
    return task.network.init(jax.random.key(0), jnp.zeros((batch, *xs.shape[2:]), xs.dtype))[1]


def make_measure(task: Task) -> Callable[[PyTree, LastUpdate, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """The three measured parts of a ``Record``, over seeds; one compiled function for all rules."""

    test = task.test()

    def measure(params: PyTree, last: LastUpdate, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        xs, targets = task.sample(key, last.index)
        reference = RULES["BPTT"](task.network, cross_entropy).gradient
        rule, bptt = last.lower_gradient, reference(last.params, make_carry(task, xs.shape[1]), xs, targets)[1][0]
        norm, bptt_norm = optax.tree.norm(rule), optax.tree.norm(bptt)

        xs, targets = test
        apply = jax.vmap(task.network.apply, in_axes=(None, 0, 0))
        _, logits = jax.lax.scan(lambda carry, x: apply(params, carry, x), make_carry(task, xs.shape[1]), xs)
        accuracy = jnp.mean(jnp.argmax(logits[-1], axis=-1) == targets.label[-1])
        return accuracy, optax.tree.vdot(rule, bptt) / (norm * bptt_norm), norm / bptt_norm

    return jax.jit(jax.vmap(measure))


class Start(NamedTuple):
    """Where all rules start on a task; arrays have one entry per seed."""

    keys: jax.Array
    params: PyTree
    optimiser_state: PyTree


def make_optimiser(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, its learning rate decayed to zero by a cosine over all updates."""
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.updates))


def make_start(task: Task, seeds: tuple[int, ...], config: ml_collections.ConfigDict) -> Start:
    """Made once for all rules: an initialiser takes as long to compile as a rule."""
    xs, _ = jax.eval_shape(task.sample, jax.random.key(0), 0)
    x = jnp.zeros(xs.shape[1:], xs.dtype)

    def start(key: jax.Array) -> tuple[PyTree, PyTree]:
        params, _ = task.network.init(jax.random.fold_in(key, 0), x)
        return params, make_optimiser(config).init(params)

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return Start(keys, *jax.jit(jax.vmap(start))(keys))


class Trainer:
    """A rule at work on a task: iterate over ``records()``; afterwards ask ``milliseconds_per_step()``.

    Args:
      task: what is to be learnt.
      rule: a name from ``RULES``.
      start: from ``make_start``; its seeds are trained side by side.
      measure: from ``make_measure``.
      config: as for ``make_optimiser``, and ``updates_per_call``, the updates between two records, a divisor of
        ``updates``.
    """

    def __init__(
        self, task: Task, rule: str, start: Start, measure: Callable, config: ml_collections.ConfigDict
    ) -> None:
        self.task, self._start, self._measure, self._config = task, start, measure, config
        xs, _ = jax.eval_shape(task.sample, jax.random.key(0), 0)
        self._length, self._x = len(xs), jnp.zeros(xs.shape[1:], xs.dtype)
        self._rule = RULES[rule](task.network, cross_entropy)
        self._optimiser = make_optimiser(config)
        # Seeds one after the other, so that the traces of one batch stay in the processor's cache.
        self._train = jax.jit(
            lambda start, *of_seeds: jax.lax.map(lambda of_seed: self._updates(start, *of_seed), of_seeds)
        )

    def records(self) -> Iterator[Record]:
        """Train, and report after every ``updates_per_call`` updates."""
        keys, params, optimiser_state = self._start
        for start in range(0, self._config.updates, self._config.updates_per_call):
            params, optimiser_state, last = self._train(start, params, optimiser_state, keys)
            measured = self._measure(params, last, keys)
            yield Record(start + self._config.updates_per_call, *(np.asarray(value) for value in measured))

    def milliseconds_per_step(self) -> float:
        """Wall time per time step of one batch: gradient, optimiser, data. Ask after training, on an idle machine."""
        keys, *given = self._start
        start = time.perf_counter()
        jax.block_until_ready(self._train(0, *given, keys))
        steps = len(keys) * self._config.updates_per_call * self._length
        return 1e3 * (time.perf_counter() - start) / steps

    def trace_bytes(self) -> int | None:
        """Bytes of traces for one batch; None for BPTT."""
        params = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], self._start.params))
        return self._rule.trace_bytes(params, make_carry(self.task, len(self._x)), self._x)

    def _updates(
        self, start: jax.Array, params: PyTree, optimiser_state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, LastUpdate]:
        carry = make_carry(self.task, len(self._x))

        def update(state: tuple, index: jax.Array) -> tuple[tuple, None]:
            params, optimiser_state, _ = state
            xs, targets = self.task.sample(key, index)
            _, grads = self._rule.gradient(params, carry, xs, targets)
            steps, optimiser_state = self._optimiser.update(grads, optimiser_state)
            return (optax.apply_updates(params, steps), optimiser_state, LastUpdate(index, params, grads[0])), None

        indices = start + jnp.arange(self._config.updates_per_call)
        nothing = LastUpdate(indices[0], params, params[0])
        return jax.lax.scan(update, (params, optimiser_state, nothing), indices)[0]
