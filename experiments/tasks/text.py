"""Text, character by character: at every step, which character comes next?

The text is Python's own documentation of its language (``pydoc_data.topics``, some 460,000 characters; it differs a
little between versions of Python) or any text file in UTF-8. Its first 95 % are for training, the rest is held out.

The ``size - 1`` most frequent characters of the training part are the alphabet; every other one is the last character,
"other". Training reads the text as ``batch`` parallel streams: stream s begins at character s · (characters // batch),
and batch number i of training is the next ``steps`` characters of every stream, going round at the text's end. So
carry and traces go on from batch to batch, over the whole text.

*Shapes*: xs (T, batch, size) float32, one-hot; targets.label (T, batch) int32, the next character; targets.weight
(T, batch) float32, 1 / T each, so that the loss of a sequence is the mean over its steps, in nats per character.

*Chance level*: 1 / size; log2(size) bits per character. Knowing how frequent each character is, not the order,
costs some 4.6 bits; ``bits_of_order`` gives what a table of the last few characters costs.

*A perfect solver*: none is known.

*Source*: ``pydoc_data.topics`` of the Python running this; the measure as in A. Graves, "Generating Sequences With
Recurrent Neural Networks", arXiv:1308.0850 (2013).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets

TRAINING_SHARE = 0.95
OTHER = "\ufffd"


class Text(NamedTuple):
    """Characters as numbers.

    Attributes:
      train, held_out: (characters,) int32.
      alphabet: the character of each number; the last one stands for all others.
    """

    train: jax.Array
    held_out: jax.Array
    alphabet: str


def load(path: str | None = None, size: int = 96) -> Text:
    """The text of a file, or of ``pydoc_data.topics``.

    Raises:
      ValueError: no such file, not UTF-8, or shorter than 1,000 characters.
    """
    check_at_least(2, size=size)
    if path is None:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"path={path!r} cannot be read as text: {error}. Give a text file in UTF-8.") from error
    if len(text) < 1000:
        raise ValueError(f"The text has {len(text)} characters; at least 1,000 are needed.")
    cut = int(TRAINING_SHARE * len(text))
    # By frequency, then by code point: the same on every machine.
    ranked = sorted(Counter(text[:cut].replace(OTHER, "")).items(), key=lambda item: (-item[1], item[0]))
    alphabet = "".join(character for character, _ in ranked[: size - 1]) + OTHER
    found = numbers(text, alphabet)
    return Text(found[:cut], found[cut:], alphabet)


def numbers(text: str, alphabet: str) -> jax.Array:
    """Characters as their places in the alphabet, (characters,) int32; the last place for those not in it."""
    place = {character: i for i, character in enumerate(alphabet)}
    return jnp.asarray(np.array([place.get(character, len(alphabet) - 1) for character in text], np.int32))


def sample(index: jax.Array, characters: jax.Array, size: int, *, batch: int, steps: int) -> tuple[jax.Array, Targets]:
    """Batch number ``index`` of a text: the next ``steps`` characters of ``batch`` streams.

    Raises:
      ValueError: sizes below 1, or a stream shorter than one batch.
    """
    check_at_least(1, batch=batch, steps=steps)
    stream = len(characters) // batch
    if stream <= steps:
        raise ValueError(
            f"{len(characters)} characters in batch={batch} streams are {stream} each; "
            f"more than steps={steps} are needed. Give a longer text, or fewer or shorter streams."
        )
    first = jnp.arange(batch) * stream
    # One index for the last input and its label: the label of step t is the input of step t + 1.
    offset = (jnp.asarray(index) * steps + jnp.arange(steps + 1)) % stream
    seen = characters[first[None, :] + offset[:, None]]
    weight = jnp.full((steps, batch), 1 / steps, jnp.float32)
    return jax.nn.one_hot(seen[:-1], size, dtype=jnp.float32), Targets(seen[1:], weight)


def bits_of_order(text: Text, order: int) -> float:
    """Bits per character, on the held-out part, of a table of the training part's counts after ``order`` characters.

    Counts of a context are blended with those of the next shorter one, weight 1 (a Dirichlet prior).
    """
    check_at_least(0, order=order)
    train, held_out, size = np.asarray(text.train).tolist(), np.asarray(text.held_out).tolist(), len(text.alphabet)
    counts: list[dict[tuple, Counter]] = [{} for _ in range(order + 1)]
    for length, table in enumerate(counts):
        for i in range(length, len(train)):
            table.setdefault(tuple(train[i - length : i]), Counter())[train[i]] += 1
    totals = [{context: counter.total() for context, counter in table.items()} for table in counts]
    bits = 0.0
    for i in range(order, len(held_out)):
        chance = 1 / size
        for length in range(order + 1):
            context = tuple(held_out[i - length : i])
            if context in totals[length]:
                chance = (counts[length][context][held_out[i]] + chance) / (totals[length][context] + 1)
        bits -= np.log2(chance)
    return bits / (len(held_out) - order)
