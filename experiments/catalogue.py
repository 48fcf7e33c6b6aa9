"""The tasks by name, one line each in ``TASKS``: data together with the network that is to learn it.

The options of a task are the keyword arguments of its function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepeprop_jax import Cell, stack
from experiments import networks
from experiments.cells import CELLS
from experiments.refusal import Refused, check_name
from experiments.rules import LossFn
from experiments.tasks import digits, xor_count
from experiments.tasks.targets import Targets, cross_entropy

PyTree = Any


def largest_is_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Whether the largest of the logits (T, batch, classes) is that of the label (T, batch)."""
    return jnp.argmax(logits, axis=-1) == label


class Task(NamedTuple):
    """What is to be learnt.

    Attributes:
      network: the network, a stack whose lowest layer is ``params[0]``.
      sample: ``sample(key, index) -> (xs, targets)``: the training batch of number ``index``, the same for every rule.
      test: ``test() -> (xs, targets)``, held out.
      loss_fn: one step's loss on the batched output, weighted.
      right: ``right(y, label) -> (T, batch)``, the share of right answers at every step.
      continues: whether batch ``index + 1`` goes on where batch ``index`` ended, so that carry and traces go on too.
    """

    network: Cell
    sample: Callable[[jax.Array, jax.Array], tuple[jax.Array, Targets]]
    test: Callable[[], tuple[jax.Array, Targets]]
    loss_fn: LossFn = cross_entropy
    right: Callable[[PyTree, jax.Array], jax.Array] = largest_is_label
    continues: bool = False


def independent(sample: Callable[[jax.Array], tuple[jax.Array, Targets]]) -> Callable:
    """Batches drawn anew, each by a key of its own."""
    return lambda key, index: sample(jax.random.fold_in(jax.random.fold_in(key, 1), index))


def digits_task(*, features: int, blank: int, batch: int, cell: str = "GRUCell", layers: int = 2) -> Task:
    """Handwritten digits, row by row, answered after some blank steps: equal layers below a linear readout."""
    check_name("cell", cell, CELLS)
    if layers < 1:
        raise Refused(f"layers must be at least 1; seen {layers}.")
    train, test = digits.load()
    return Task(
        network=stack(*[CELLS[cell](features) for _ in range(layers)], nn.Dense(digits.CLASSES)),
        sample=independent(partial(digits.sample, images=train, batch=batch, blank=blank)),
        test=lambda: digits.sequences(test, blank),
    )


def xor_task(
    *, features: int, width: int, cues: int, gap: int, delay: int, decay: float, batch: int, test_size: int
) -> Task:
    """XOR-count: a feature formed in a layer without memory, long before the loss."""
    sample = partial(xor_count.sample, cues=cues, gap=gap, delay=delay, width=width)
    return Task(
        network=networks.xor_network(features, xor_count.CLASSES, decay),
        sample=independent(partial(sample, batch=batch)),
        test=lambda: sample(jax.random.key(10_000), batch=test_size),
    )


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits_task,
    "xor_count": xor_task,
}
