"""The demo's training: one network by one rule, several seeds at once, measured on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.tasks.catalogue import Task
from experiments.training import measure
from experiments.training.against_bptt import compare
from experiments.training.loop import Learning, Loop
from experiments.training.optimisers import OPTIMISERS
from experiments.training.rules import RULES, Rule

PyTree = Any


class Record(NamedTuple):
    """What is known after some updates; arrays have one entry per seed.

    Attributes:
      update: number of updates made.
      accuracy: on the test set.
      cosine: of the last update's gradient of the lower layer with that of BPTT, same parameters, same batch.
      norm_ratio: of the same two gradients, rule over BPTT.
    """

    update: int
    accuracy: np.ndarray
    cosine: np.ndarray
    norm_ratio: np.ndarray


def make_measured(task: Task) -> Callable[..., tuple[jax.Array, PyTree]]:
    """``measured(params, earlier_params, key, index) -> (accuracy, lower_gradient)``, over seeds, for all rules.

    The gradient is that of BPTT of the lower layer, on batch ``index`` at other, earlier parameters.
    """
    test, bptt = task.test(), RULES["BPTT"](task.network, task.loss_fn)

    def measured(params: PyTree, earlier: PyTree, key: jax.Array, index: jax.Array) -> tuple[jax.Array, PyTree]:
        accuracy, _ = measure.on_test_set(task, params, *test)
        return accuracy, measure.gradient(task, bptt, earlier, key, index)[0]

    return jax.jit(jax.vmap(measured, in_axes=(0, 0, 0, None)))


def make_loop(task: Task, rule: Rule, config: ml_collections.ConfigDict) -> Loop:
    """An update at the end of each sequence; the learning rate is decayed to zero by a cosine over all updates."""
    optimiser = OPTIMISERS["adam"](optax.cosine_decay_schedule(config.learning_rate, config.updates))
    return Loop(task, rule, optimiser, length(task), config.updates_per_call)


def length(task: Task) -> int:
    """Steps of a sequence."""
    return len(jax.eval_shape(lambda: task.sample(jax.random.key(0), 0))[0])


class Start(NamedTuple):
    """Where all rules start on a task; arrays have one entry per seed."""

    keys: jax.Array
    learning: Learning


def make_start(task: Task, seeds: tuple[int, ...], config: ml_collections.ConfigDict) -> Start:
    """Made once for all rules: an initialiser takes as long to compile as a rule."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    any_rule = RULES["BPTT"](task.network, task.loss_fn)
    return Start(keys, jax.jit(jax.vmap(make_loop(task, any_rule, config).start))(keys))


class Trainer:
    """A rule at work on a task: iterate over ``records()``; afterwards ask ``milliseconds_per_step()``.

    Args:
      task: what is to be learnt.
      rule: a name from ``RULES``.
      start: from ``make_start``; its seeds are trained side by side.
      measured: from ``make_measured``.
      config: as for ``make_loop``: ``learning_rate``, ``updates``, and ``updates_per_call``, the updates between two
        records, a divisor of ``updates``.
    """

    def __init__(
        self, task: Task, rule: str, start: Start, measured: Callable, config: ml_collections.ConfigDict
    ) -> None:
        self._task, self._start, self._measured, self._config = task, start, measured, config
        self._rule = RULES[rule](task.network, task.loss_fn)
        self._loop = make_loop(task, self._rule, config)

    def records(self) -> Iterator[Record]:
        """Train, and report after every ``updates_per_call`` updates."""
        keys, learning = self._start
        for first in range(0, self._config.updates, self._config.updates_per_call):
            learning, last = self._loop.advance_seeds(learning, keys, np.int32(first))
            update = first + self._config.updates_per_call
            accuracy, bptt = self._measured(learning.params, last.params, keys, np.int32(update - 1))
            pairs = [jax.tree.map(lambda leaf, i=i: leaf[i], (last.gradient[0], bptt)) for i in range(len(keys))]
            figures = [compare(*pair) for pair in pairs]
            yield Record(update, np.asarray(accuracy), *(_column(figures, name) for name in ("cosine", "norm_ratio")))

    def milliseconds_per_step(self) -> float:
        """Wall time per time step of one batch: gradient, optimiser, data. Ask after training, on an idle machine."""
        keys, learning = self._start
        steps = len(keys) * self._config.updates_per_call * length(self._task)
        start = time.perf_counter()
        jax.block_until_ready(self._loop.advance_seeds(learning, keys, np.int32(0)))
        return 1e3 * (time.perf_counter() - start) / steps

    def trace_bytes(self) -> int | None:
        """Bytes of traces for one batch; None for BPTT."""
        params = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], self._start.learning.params))
        x = measure.silence(self._task)
        return self._rule.trace_bytes(params, measure.initial_carry(self._task, x), x)


def _column(figures: list[dict[str, float | None]], name: str) -> np.ndarray:
    """Of all seeds; nan where it is undefined."""
    return np.array([math.nan if one[name] is None else one[name] for one in figures])
