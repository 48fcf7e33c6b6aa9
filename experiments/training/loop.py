"""The compiled parts of one training run: batches with updates inside them or at their ends, and what is measured."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.catalogue import Task
from experiments.training.rules import RULES, Rule

PyTree = Any


class Learning(NamedTuple):
    """All that changes while a network learns.

    Attributes:
      params: of the network.
      optimiser_state: of the optimiser.
      stream: carry and traces that the next batch goes on from; None where every batch starts anew.
    """

    params: optax.Params
    optimiser_state: optax.OptState
    stream: PyTree


class Loop:
    """One rule at work on one task, several batches per compiled call.

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
    """

    def __init__(
        self,
        task: Task,
        rule: Rule,
        optimiser: optax.GradientTransformation,
        update_every: int,
        batches_per_call: int,
    ) -> None:
        self._task, self._rule, self._optimiser = task, rule, optimiser
        self._update_every, self._batches_per_call = update_every, batches_per_call
        xs, _ = jax.eval_shape(lambda: task.sample(jax.random.key(0), 0))
        self._x = jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype)
        self._test = None
        self.start = jax.jit(self._start)
        self.advance = jax.jit(self._advance)
        self._tested = jax.jit(self._test_of)
        self._gradients = jax.jit(self._both_gradients)

    def _zeros(self) -> jax.Array:
        return jnp.zeros(self._x.shape, self._x.dtype)

    def _carry(self, x: jax.Array) -> PyTree:
        """The network's initial carry, which does not depend on the key."""
        return self._task.network.init(jax.random.key(0), x)[1]

    def _start(self, key: jax.Array) -> Learning:
        """An untrained network."""
        x = self._zeros()
        params, carry = self._task.network.init(jax.random.fold_in(key, 0), x)
        stream = self._rule.start(params, carry, x) if self._task.continues else None
        return Learning(params, self._optimiser.init(params), stream)

    def _advance(self, learning: Learning, key: jax.Array, first: jax.Array) -> tuple[Learning, jax.Array]:
        """Learn from ``batches_per_call`` batches, from number ``first`` on; also gives their mean loss."""

        def update(state: Learning, piece: tuple) -> tuple[Learning, jax.Array]:
            params, optimiser_state, stream = state
            (loss, stream), grads = self._rule.piece(params, stream, *piece)
            steps, optimiser_state = self._optimiser.update(grads, optimiser_state, params)
            return Learning(optax.apply_updates(params, steps), optimiser_state, stream), loss

        def batch(state: Learning, index: jax.Array) -> tuple[Learning, jax.Array]:
            sequence = self._task.sample(key, index)
            if not self._task.continues:
                x = self._zeros()
                state = state._replace(stream=self._rule.start(state.params, self._carry(x), x))
            pieces = jax.tree.map(lambda leaf: leaf.reshape(-1, self._update_every, *leaf.shape[1:]), sequence)
            state, losses = jax.lax.scan(update, state, pieces)
            return state if self._task.continues else state._replace(stream=None), losses.sum()

        learning, losses = jax.lax.scan(batch, learning, first + jnp.arange(self._batches_per_call, dtype=first.dtype))
        return learning, losses.mean()

    def test(self, params: PyTree) -> dict[str, float | None]:
        """On the test set, steps weighted as in the loss: the share of right answers, and the loss of a sequence."""
        self._test = self._test or self._task.test()
        accuracy, loss = self._tested(params, *self._test)
        return {"test_accuracy": float(accuracy), "test_loss": quotient(float(loss), 1)}

    def _test_of(self, params: PyTree, xs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
        apply = jax.vmap(self._task.network.apply, in_axes=(None, 0, 0))

        def step(carry: PyTree, at: tuple) -> tuple[PyTree, tuple[PyTree, jax.Array]]:
            x, target = at
            carry, y = apply(params, carry, x)
            return carry, (y, self._task.loss_fn(y, target))

        _, (outputs, losses) = jax.lax.scan(step, self._carry(xs[0]), (xs, targets))
        right = self._task.right(outputs, targets.label)
        return jnp.sum(right * targets.weight) / jnp.sum(targets.weight), losses.sum()

    def fidelity(self, params: PyTree, key: jax.Array, index: int) -> list[dict[str, float | None]]:
        """The rule's gradient beside that of BPTT, per layer: same parameters, batch ``index``, no update inside it.

        Both start from the initial carry, without traces, also where training goes on from batch to batch.
        """
        return [compare(*pair) for pair in zip(*self._gradients(params, key, index), strict=True)]

    def _both_gradients(self, params: PyTree, key: jax.Array, index: jax.Array) -> tuple[PyTree, PyTree]:
        sequence = self._task.sample(key, index)
        carry = self._carry(self._zeros())
        reference = RULES["BPTT"](self._task.network, self._task.loss_fn)
        return tuple(rule.gradient(params, carry, *sequence)[1] for rule in (self._rule, reference))


def compare(found: PyTree, reference: PyTree) -> dict[str, float | None]:
    """A layer's gradient g beside that of BPTT, r; None where undefined.

    cosine = ⟨g, r⟩ / (‖g‖ ‖r‖), relative_error = ‖g − r‖ / ‖r‖, norm_ratio = ‖g‖ / ‖r‖
    """
    g, r = (
        np.concatenate([np.zeros(0), *(np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree))])
        for tree in (found, reference)
    )
    norm_g, norm_r = (float(np.linalg.norm(vector)) for vector in (g, r))
    return {
        "cosine": quotient(float(g @ r), norm_g * norm_r),
        "relative_error": quotient(float(np.linalg.norm(g - r)), norm_r),
        "norm_ratio": quotient(norm_g, norm_r),
    }


def quotient(above: float, below: float) -> float | None:
    """None where it is not a finite number."""
    value = above / below if below > 0 else math.nan
    return value if math.isfinite(value) else None
