"""Recall in a text: what was said of a letter, many characters of real text ago?

    steps              what is shown
    3 · pairs          for each pair: the mark, a key, a value
    ``gap``            consecutive characters of the text, from a random place
    2                  the mark, one of the keys; at this last step its value is asked for

    length             T = 3 · pairs + gap + 2

Keys and values are among the 16 most frequent characters of the text, so that the gap is full of them; only the mark,
which the text does not have, tells a pair from the text. The keys of a sequence differ; values are drawn independently.

*Shapes*: xs (T, batch, size + 1) float32, one-hot, the mark last; targets.label (T, batch) int32, the value's number
0 to 15; targets.weight (T, batch) float32, 1 at the last step and 0 elsewhere.

*Chance level*: 1 / 16. Who remembers the values but not their keys gets about 1 / pairs.

*A perfect solver*: 1.0.

*Source*: this repository; the texts are those of ``experiments.tasks.text``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets, at_last_step

VALUES = 16
CHANCE = 1 / VALUES


def sample(
    key: jax.Array, characters: jax.Array, size: int, batch: int, *, pairs: int = 1, gap: int = 32
) -> tuple[jax.Array, Targets]:
    """``batch`` fresh sequences.

    Args:
      characters: (length,) int32, the text as the numbers of an alphabet by frequency, such as ``text.load`` gives.
      size: of the alphabet.

    Raises:
      ValueError: sizes below 1, an alphabet of fewer than 16 characters, more pairs than keys, or a text shorter than
        the gap.
    """
    check_at_least(1, batch=batch, pairs=pairs, gap=gap)
    check_at_least(VALUES + 1, size=size)
    if pairs > VALUES or gap > len(characters):
        raise ValueError(
            f"There are {VALUES} keys and {len(characters)} characters of text; seen pairs={pairs}, gap={gap}."
        )
    keys_key, values_key, place_key, asked_key = jax.random.split(key, 4)
    keys = jax.vmap(lambda one: jax.random.permutation(one, VALUES)[:pairs])(jax.random.split(keys_key, batch)).T
    values = jax.random.randint(values_key, (pairs, batch), 0, VALUES)
    marks = jnp.full((pairs, batch), size)
    told = jnp.stack([marks, keys, values], axis=1).reshape(3 * pairs, batch)
    place = jax.random.randint(place_key, (batch,), 0, len(characters) - gap + 1)
    between = characters[place[None] + jnp.arange(gap)[:, None]]
    asked = jax.random.randint(asked_key, (1, batch), 0, pairs)
    question = jnp.concatenate([marks[:1], jnp.take_along_axis(keys, asked, axis=0)])
    shown = jnp.concatenate([told, between, question])
    label = jnp.take_along_axis(values, asked, axis=0)[0].astype(jnp.int32)
    return jax.nn.one_hot(shown, size + 1, dtype=jnp.float32), at_last_step(label, len(shown))
