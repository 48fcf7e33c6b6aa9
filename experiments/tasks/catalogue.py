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
from experiments.program.refusal import check_name
from experiments.tasks import digits, evidence, motifs, networks, recall, series, text, text_recall, xor_count
from experiments.tasks.arguments import check_at_least
from experiments.tasks.cells import CELLS
from experiments.tasks.targets import LossFn, Targets, bit_cross_entropy, cross_entropy

PyTree = Any
TEST_SEED = 10_000
HELD_OUT_STREAMS = 8


def largest_is_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Whether the largest of the logits (T, batch, classes) is that of the label (T, batch)."""
    return jnp.argmax(logits, axis=-1) == label


def bits_right(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The share of the bits (T, batch, bits) that the signs of the logits give."""
    return jnp.mean((logits > 0) == (label > 0), axis=-1)


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


def layers_below_readout(cell: str, layers: int, features: int, outputs: int) -> Cell:
    """Equal layers of a cell by name, below a linear readout."""
    check_name("cell", cell, CELLS)
    check_at_least(1, layers=layers, features=features)
    return stack(*[CELLS[cell](features) for _ in range(layers)], nn.Dense(outputs))


def digits_task(
    *, features: int, blank: int, batch: int, pixels_per_step: int = digits.ROWS, cell: str = "GRUCell", layers: int = 2
) -> Task:
    """Handwritten digits, by rows or by pixels, answered after some blank steps."""
    network = layers_below_readout(cell, layers, features, digits.CLASSES)
    train, test = digits.load()
    options = {"blank": blank, "pixels_per_step": pixels_per_step}
    return Task(
        network=network,
        sample=independent(partial(digits.sample, images=train, batch=batch, **options)),
        test=lambda: digits.sequences(test, **options),
    )


def generated(network: Cell, sample: Callable, batch: int, test_size: int, **options: Any) -> Task:
    """Sequences that are made up as they are needed, ``sample(key, batch=...)``, the test set too."""
    return Task(
        network=network,
        sample=independent(partial(sample, batch=batch)),
        test=lambda: sample(jax.random.key(TEST_SEED), batch=test_size),
        **options,
    )


def xor_task(
    *,
    features: int,
    width: int,
    cues: int,
    gap: int,
    delay: int,
    decay: float,
    batch: int,
    test_size: int,
    distractors: bool = False,
    running: bool = False,
    depth: int = 2,
    memory: float = 0.0,
    angle: float = 0.0,
    bias_scale: float = 0.0,
    from_rest: bool = False,
) -> Task:
    """XOR-count: a feature formed in a layer with little or no memory, long before the loss."""
    of_task = {"cues": cues, "gap": gap, "delay": delay, "width": width}
    sample = partial(xor_count.sample, **of_task, distractors=distractors, running=running)
    options = {"depth": depth, "memory": memory, "angle": angle, "bias_scale": bias_scale, "from_rest": from_rest}
    network = networks.xor_network(features, xor_count.CLASSES, decay, **options)
    return generated(network, sample, batch, test_size)


def motifs_task(*, features: int, presentations: int, delay: int, batch: int, test_size: int) -> Task:
    """Classify, then count: a fast dense layer below a slow one."""
    sample = partial(motifs.sample, presentations=presentations, delay=delay)
    return generated(networks.motif_network(features, motifs.CLASSES), sample, batch, test_size)


def recall_task(
    *,
    features: int,
    bits: int,
    length: int,
    pad: int,
    batch: int,
    test_size: int,
    cell: str = "GRUCell",
    layers: int = 2,
) -> Task:
    """Delayed recall: many bits, with a loss at every step of the recall."""
    network = layers_below_readout(cell, layers, features, bits)
    sample = partial(recall.sample, bits=bits, length=length, pad=pad)
    return generated(network, sample, batch, test_size, loss_fn=bit_cross_entropy, right=bits_right)


def evidence_task(*, features: int, cells: str, cues: int, delay: int, recall: int, batch: int, test_size: int) -> Task:
    """Evidence accumulation by spiking neurons, ``cells`` a key of ``networks.SPIKING``."""
    network = networks.spiking_network(features, evidence.CLASSES, cells, evidence.DT)
    return generated(network, partial(evidence.sample, cues=cues, delay=delay, recall=recall), batch, test_size)


def series_task(*, name: str, features: int, batch: int, cell: str = "GRUCell", layers: int = 2) -> Task:
    """Recordings of many channels: JapaneseVowels or BasicMotions."""
    train, test, classes = series.load(name)
    return Task(
        network=layers_below_readout(cell, layers, features, classes),
        sample=independent(partial(series.sample, recordings=train, batch=batch)),
        test=lambda: series.sequences(test),
    )


def text_task(
    *,
    size: int,
    features: int,
    batch: int,
    steps: int,
    path: str | None = None,
    cell: str = "GRUCell",
    layers: int = 2,
) -> Task:
    """The next character of a text, read as parallel streams that go on from batch to batch."""
    network = layers_below_readout(cell, layers, features, size)
    corpus = text.load(path, size)
    text.sample(jnp.int32(0), corpus.train, size, batch=batch, steps=steps)  # refuses what cannot be read

    def held_out() -> tuple[jax.Array, Targets]:
        whole = (len(corpus.held_out) // HELD_OUT_STREAMS) - 1
        return text.sample(jnp.int32(0), corpus.held_out, size, batch=HELD_OUT_STREAMS, steps=whole)

    return Task(
        network=network,
        sample=lambda key, index: text.sample(index, corpus.train, size, batch=batch, steps=steps),
        test=held_out,
        continues=True,
    )


def text_recall_task(
    *,
    size: int,
    features: int,
    pairs: int,
    gap: int,
    decay: float,
    batch: int,
    test_size: int,
    path: str | None = None,
) -> Task:
    """What was said of a letter, many characters of real text ago; the test set is from the held-out part."""
    network = networks.recall_network(features, text_recall.VALUES, decay)
    corpus = text.load(path, size)
    sample = partial(text_recall.sample, size=size, pairs=pairs, gap=gap)
    return Task(
        network=network,
        sample=independent(partial(sample, characters=corpus.train, batch=batch)),
        test=lambda: sample(jax.random.key(TEST_SEED), characters=corpus.held_out, batch=test_size),
    )


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits_task,
    "evidence": evidence_task,
    "motifs": motifs_task,
    "recall": recall_task,
    "series": series_task,
    "text": text_task,
    "text_recall": text_recall_task,
    "xor_count": xor_task,
}
