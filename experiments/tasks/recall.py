"""Delayed recall, or copy: a pattern of bits is shown, and asked for again in the same order after a pause.

    steps                          channels 0 .. bits − 1        channel ``bits``    asked for
    ``length`` steps               bit of the pattern, ±1        0                   nothing
    ``pad`` steps                  0                             0                   nothing
    1 step                         0                             1, the signal       nothing
    ``length`` steps               0                             0                   the pattern, a row a step

    length of all      T = 2 · length + pad + 1          (48 with 20 rows and 7 steps of pad)

Bits are fair and independent. The loss is asked for at the recall steps, with weight 1 / length each, so that its sum
over a sequence is the mean over the recall steps; it is the binary cross-entropy ``targets.bit_cross_entropy`` of
``bits`` logits.

What it asks for: memory of length · bits = 140 bits, each for length + pad + 1 = 28 steps. The layer that stores a bit
needs no feature formed below it, and the loss is dense, so credit between layers over time is expected to matter
little.

*Shapes*: xs (T, batch, bits + 1) float32; targets.label (T, batch, bits) int32, the bits to be recalled, and 0 where
nothing is asked; targets.weight (T, batch) float32.

*Chance level*: 0.5 of the bits; the loss of a guess is log 2 per bit.

*A perfect solver*: 1.0 of the bits, loss 0.

*Source*: the copy task of A. Graves, G. Wayne, I. Danihelka, "Neural Turing Machines", arXiv:1410.5401 (2014), with
fixed length, ±1 for bits, and a pause before the signal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets

CHANCE = 0.5


def sample(key: jax.Array, batch: int, *, bits: int = 7, length: int = 20, pad: int = 7) -> tuple[jax.Array, Targets]:
    """``batch`` fresh sequences.

    Raises:
      ValueError: sizes below 1 (pad: below 0).
    """
    check_at_least(1, batch=batch, bits=bits, length=length)
    check_at_least(0, pad=pad)
    steps, first = 2 * length + pad + 1, length + pad + 1
    pattern = jax.random.bernoulli(key, 0.5, (length, batch, bits))
    xs = jnp.zeros((steps, batch, bits + 1), jnp.float32)
    xs = xs.at[:length, :, :bits].set(jnp.where(pattern, 1.0, -1.0).astype(jnp.float32))
    xs = xs.at[first - 1, :, bits].set(1)
    label = jnp.zeros((steps, batch, bits), jnp.int32).at[first:].set(pattern.astype(jnp.int32))
    weight = jnp.zeros((steps, batch), jnp.float32).at[first:].set(1 / length)
    return xs, Targets(label, weight)
