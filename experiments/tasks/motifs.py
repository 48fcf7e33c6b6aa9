"""Classify, then count: short motifs are shown one after the other; which kind was shown most often?

There are 3 motifs of 3 steps over 3 input channels; step i of a motif shows 1 on one channel and 0 on the others:

    motif    channel at its steps 0, 1, 2
    0        0 1 2
    1        1 2 0
    2        2 1 0

``presentations`` motifs follow each other without a pause, then ``delay`` steps of zeros; normal noise of standard
deviation ``noise`` is added to every input of every step. The label is the motif shown most often, asked for at the
last step only. Sequences of motifs are drawn uniformly from all those in which one motif is shown more often than any
other.

    length        T = 3 · presentations + delay
    label         argmax_k |{presentations of motif k}|

What it asks for: each motif shows each channel once, so the sum over steps of any function of one step's inputs is
distributed alike for all motifs: a layer without memory below a sum learns nothing, and the order inside a motif
must be seen before anything can be counted. It is not a test of depth: at known times the first step of a motif tells
which one it is, so a linear readout of the whole sequence gives the label (0.999 by least squares on 2,000 sequences).

*Shapes*: xs (T, batch, 3) float32; targets.label (T, batch) int32; targets.weight (T, batch) float32, 1 at the last
step and 0 elsewhere.

*Chance level*: 1/3, exactly, for motifs can change names without changing the distribution.

*A perfect solver*: 1.0 at the noise given; two motifs are at least 2 apart, 20 standard deviations.

*Source*: after an unpublished student study of deep e-prop (3 motifs of 3 steps, delay 6, 12 or 20). Which motifs, how
many presentations, the noise and what happens to ties are choices made here.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets, at_last_step

MOTIFS = ((0, 1, 2), (1, 2, 0), (2, 1, 0))
STEPS = 3
CLASSES = 3
CHANCE = 1 / CLASSES
MOST_PRESENTATIONS = 9  # all 3^9 = 19,683 sequences are listed


def sample(
    key: jax.Array, batch: int, *, presentations: int = 5, delay: int = 12, noise: float = 0.1
) -> tuple[jax.Array, Targets]:
    """``batch`` fresh sequences.

    Raises:
      ValueError: sizes below 1 (delay: below 0), more than 9 presentations, or negative noise.
    """
    check_at_least(1, batch=batch, presentations=presentations)
    check_at_least(0, delay=delay)
    if presentations > MOST_PRESENTATIONS or noise < 0:
        raise ValueError(
            f"Motifs need at most {MOST_PRESENTATIONS} presentations and noise >= 0; seen "
            f"presentations={presentations}, noise={noise}."
        )
    choice_key, noise_key = jax.random.split(key)
    sequences, labels = untied(presentations)
    chosen = jax.random.randint(choice_key, (batch,), 0, len(labels))
    channels = jnp.asarray(MOTIFS)[jnp.asarray(sequences)[chosen]].reshape(batch, presentations * STEPS)
    shown = jax.nn.one_hot(channels.T, CLASSES, dtype=jnp.float32)
    xs = jnp.pad(shown, ((0, delay), (0, 0), (0, 0)))
    xs += noise * jax.random.normal(noise_key, xs.shape, jnp.float32)
    return xs, at_last_step(jnp.asarray(labels)[chosen], len(xs))


def untied(presentations: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences of motifs with one winner, (count, presentations) int32, and the winners (count,) int32."""
    sequences = np.array(list(itertools.product(range(CLASSES), repeat=presentations)), np.int32)
    counts = np.stack([np.sum(sequences == motif, axis=1) for motif in range(CLASSES)], axis=1)
    alone = np.sum(counts == counts.max(axis=1, keepdims=True), axis=1) == 1
    return sequences[alone], counts[alone].argmax(axis=1).astype(np.int32)
