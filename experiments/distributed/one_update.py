"""What every process does: its own examples of a batch, and the update that all of them share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from deepeprop_jax import data_parallel, deep_eprop
from deepeprop_jax.learner import OnlineLearner
from experiments.tasks import networks, xor_count
from experiments.tasks.targets import Targets

PyTree = Any
SEED = 0


def samples(number: int, process: int, examples: int) -> tuple[jax.Array, Targets]:
    """The examples of one process in one update, in float64."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), number), process)
    xs, targets = xor_count.sample(key, examples)
    return xs.astype(jnp.float64), targets._replace(weight=targets.weight.astype(jnp.float64))


def losses(batch: int, logits: jax.Array, target: Targets) -> jax.Array:
    """Cross-entropy of each example, its part of the mean over the batch."""
    found = optax.softmax_cross_entropy_with_integer_labels(logits, target.label)
    return target.weight * found / batch


class Training:
    """Params and optimiser, the same in all processes.

    Args:
      batch: examples of an update, of all processes together.
    """

    def __init__(self, batch: int) -> None:
        network = networks.xor_network(features=16, classes=xor_count.CLASSES, decay=0.99, bias_scale=0.5)
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        whole, self._in_time = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "data")))
        self._batch, self._one, self._optimiser = batch, deep_eprop(network), optax.adam(1e-2)
        self._many = data_parallel(self._one, mesh)
        x = jnp.zeros((batch, xor_count.sample(jax.random.key(SEED), 1)[0].shape[-1]))

        def start() -> tuple[PyTree, PyTree]:
            params, _ = network.init(jax.random.key(SEED), x.astype(jnp.float32))
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
            return params, self._optimiser.init(params)

        self._params, self._state = jax.jit(start, out_shardings=whole)()
        self._update = jax.jit(self._one_update)

    def _gradient(self, learner: OnlineLearner, params: PyTree, xs: jax.Array, targets: Targets) -> PyTree:
        _, carry = learner.network.init(jax.random.key(SEED), jnp.zeros(xs.shape[1:], jnp.float32))
        carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), carry)
        run = learner.value_and_grad(functools.partial(losses, self._batch))
        (loss, _), grads = run(params, learner.init(params, carry, xs[0]), xs, targets)
        return loss, grads

    def _one_update(self, params: PyTree, state: PyTree, xs: jax.Array, targets: Targets) -> PyTree:
        loss, grads = self._gradient(self._many, params, xs, targets)
        updates, state = self._optimiser.update(grads, state)
        return loss, optax.apply_updates(params, updates), state, grads

    def _of_all(self, number: int) -> tuple[jax.Array, Targets]:
        """The batch over all devices, of which each process makes its own part."""
        mine = samples(number, jax.process_index(), self._batch // jax.process_count())
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self._in_time, np.asarray(leaf)), mine)

    def update(self, number: int) -> float:
        """The loss before it."""
        loss, self._params, self._state, _ = self._update(self._params, self._state, *self._of_all(number))
        return float(loss)

    def difference(self, number: int) -> float:
        """|g - g of one process| / |g of one process| of an update that is not made."""
        *_, grads = self._update(self._params, self._state, *self._of_all(number))
        parts = [samples(number, p, self._batch // jax.process_count()) for p in range(jax.process_count())]
        xs, targets = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
        params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), self._params)
        _, needed = jax.jit(functools.partial(self._gradient, self._one))(params, xs, targets)
        flat, other = (
            np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])
            for tree in (jax.tree.map(lambda leaf: leaf.addressable_data(0), grads), needed)
        )
        return float(np.linalg.norm(flat - other) / np.linalg.norm(other))
