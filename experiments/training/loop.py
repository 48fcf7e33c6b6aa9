"""The compiled parts of training: batches with updates inside them or at their ends, and what is measured."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepeprop_jax import Error, LearnerState, Meter, deep_eprop, error_meter
from experiments.tasks.catalogue import Task
from experiments.training import measure
from experiments.training.against_bptt import compare_layers, quotient
from experiments.training.rules import RULES, Rule

PyTree = Any


class Learning(NamedTuple):
    """All that changes while a network learns.

    Attributes:
      params: of the network.
      optimiser_state: of the optimiser.
      stream: carry and traces that the next batch goes on from; where every batch starts anew, what the rule keeps for
        itself: None for most.
      meter: of the gradient's error; None without one.
    """

    params: optax.Params
    optimiser_state: optax.OptState
    stream: PyTree
    meter: Meter | None = None


class Update(NamedTuple):
    """An update that was made: the parameters before it, and the gradient there."""

    params: optax.Params
    gradient: optax.Params


class Loop:
    """One rule at work on one task, several batches per compiled call: the loop of every program that trains.

        stream = start(params)                                 for each batch, or once if the task continues
        (loss, stream), grads = piece(params, stream, xs[a:a+k])    for a = 0, k, 2k, ..., T − k
        params = params + optimiser(grads)

    The traces of a piece are those that the pieces before it left, at the parameters of their time: for k < T the
    updates are truly online.

    Args:
      task: what is to be learnt.
      rule: made for the task's network and loss.
      optimiser: from optax.
      update_every: k, a divisor of the sequence's length T.
      batches_per_call: how many batches ``advance`` takes.
      metered: whether the error of the gradient is measured beside it, at the cost of a forward pass with a tangent.
    """

    def __init__(
        self,
        task: Task,
        rule: Rule,
        optimiser: optax.GradientTransformation,
        update_every: int,
        batches_per_call: int,
        metered: bool = False,
    ) -> None:
        self._task, self._rule, self._optimiser = task, rule, optimiser
        self._meter = error_meter(deep_eprop(task.network), task.loss_fn) if metered else None
        self._update_every, self._batches_per_call = update_every, batches_per_call
        self._test = None
        self.start = jax.jit(self._start)
        self.advance = jax.jit(self._advance)
        self.advance_seeds = jax.jit(self._advance_seeds)
        self._tested = jax.jit(partial(measure.on_test_set, task))
        self._gradients = jax.jit(self._both_gradients)

    def _start(self, key: jax.Array) -> Learning:
        """An untrained network."""
        x = measure.silence(self._task)
        params, carry = self._task.network.init(jax.random.fold_in(key, 0), x)
        stream = self._rule.start(params, carry, x)
        stream = stream if self._task.continues else self._rule.keep(stream)
        meter = None if self._meter is None else self._meter.init(key, params, carry, x)
        return Learning(params, self._optimiser.init(params), stream, meter)

    def _advance(self, learning: Learning, key: jax.Array, first: jax.Array) -> tuple[Learning, jax.Array]:
        """Learn from ``batches_per_call`` batches, from number ``first`` on; also gives their mean loss."""
        learning, losses, _ = self._batches(learning, key, first)
        return learning, losses.mean()

    def _advance_seeds(self, learning: Learning, keys: jax.Array, first: jax.Array) -> tuple[Learning, Update]:
        """``advance`` of several networks, an axis more everywhere; also gives the last update of each."""

        def of_seed(seed: tuple[Learning, jax.Array]) -> tuple[Learning, Update]:
            learning, _, last = self._batches(*seed, first)
            return learning, last

        # One after the other, so that the traces of one batch stay in the processor's cache.
        return jax.lax.map(of_seed, (learning, keys))

    def _batches(self, learning: Learning, key: jax.Array, first: jax.Array) -> tuple[Learning, jax.Array, Update]:
        """Also gives every batch's loss and the last update."""

        def update(state: tuple[Learning, Update], piece: tuple) -> tuple[tuple[Learning, Update], jax.Array]:
            params, optimiser_state, before, meter = state[0]
            (loss, stream), grads = self._rule.piece(params, before, *piece)
            if self._meter is not None:
                carry = self._rule.carry_of(before)
                meter = self._meter.update(meter, params, LearnerState(carry, {}, None, carry), *piece, grads)
            steps, optimiser_state = self._optimiser.update(grads, optimiser_state, params)
            after = Learning(optax.apply_updates(params, steps), optimiser_state, stream, meter)
            return (after, Update(params, grads)), loss

        def batch(state: tuple[Learning, Update], index: jax.Array) -> tuple[tuple[Learning, Update], jax.Array]:
            learning, last = state
            sequence = self._task.sample(key, index)
            if not self._task.continues:
                stream = self._fresh(learning.params)
                stream = stream if learning.stream is None else self._rule.resume(stream, learning.stream)
                learning = learning._replace(stream=stream)
                if self._meter is not None:
                    x = measure.silence(self._task)
                    meter = self._meter.begin(learning.meter, learning.params, measure.initial_carry(self._task, x), x)
                    learning = learning._replace(meter=meter)
            pieces = jax.tree.map(lambda leaf: leaf.reshape(-1, self._update_every, *leaf.shape[1:]), sequence)
            (learning, last), losses = jax.lax.scan(update, (learning, last), pieces)
            kept = self._rule.keep(learning.stream)
            stream = self._rule.resume(learning.stream, kept) if self._task.continues else kept
            return (learning._replace(stream=stream), last), losses.sum()

        if not self._task.continues and learning.stream is None:  # also where another rule's loop has begun it
            learning = learning._replace(stream=self._rule.keep(self._fresh(learning.params)))
        nothing = Update(learning.params, learning.params)
        indices = first + jnp.arange(self._batches_per_call, dtype=first.dtype)
        (learning, last), losses = jax.lax.scan(batch, (learning, nothing), indices)
        return learning, losses, last

    def _fresh(self, params: PyTree) -> PyTree:
        """The rule's state before a sequence."""
        x = measure.silence(self._task)
        return self._rule.start(params, measure.initial_carry(self._task, x), x)

    def test(self, params: PyTree) -> dict[str, float | None]:
        """On the test set, steps weighted as in the loss: the share of right answers, and the loss of a sequence."""
        self._test = self._test or self._task.test()
        accuracy, loss = self._tested(params, *self._test)
        return {"test_accuracy": float(accuracy), "test_loss": quotient(float(loss), 1)}

    def error(self, learning: Learning) -> dict[str, Any]:
        """What the meter reads: the relative error against BPTT, its standard error, and that of each node."""
        found = Error(*map(np.asarray, self._meter.error(learning.meter))) if self._meter is not None else None
        if found is None:
            return {}
        nodes = [quotient(float(value), 1) for value in found.nodes]
        return {
            "meter": quotient(float(found.total), 1),
            "meter_uncertainty": quotient(float(found.uncertainty), 1),
            "meter_nodes": nodes,
        }

    def fidelity(self, learning: Learning, key: jax.Array, index: int) -> list[dict[str, float | None]]:
        """The rule's gradient beside that of BPTT, per layer: same parameters, batch ``index``, no update inside it.

        Both start from the initial carry, without traces, also where training goes on from batch to batch.
        """
        return compare_layers(*self._gradients(learning, key, index))

    def _both_gradients(self, learning: Learning, key: jax.Array, index: jax.Array) -> tuple[PyTree, PyTree]:
        reference = RULES["BPTT"](self._task.network, self._task.loss_fn)
        kept = self._rule.keep(learning.stream) if self._task.continues else learning.stream
        return (
            measure.gradient(self._task, self._rule, learning.params, key, index, kept),
            measure.gradient(self._task, reference, learning.params, key, index),
        )
