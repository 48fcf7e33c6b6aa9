"""Handwritten digits, fed row by row or pixel by pixel, answered after a blank delay.

The 1,797 digits of 8 × 8 pixels (0 to 16 ink levels) that scikit-learn ships, in a fixed split of 1,297 for training
and 500 for the test.

One example is a sequence of T = 64 / pixels_per_step + blank steps. The image is read like a page, rows from the top,
each from the left, and shown ``pixels_per_step`` numbers in [0, 1] at a time: 8 is a row a step (T = 8 + blank), 1 is a
pixel a step (T = 64 + blank). The blank steps after that show zeros. The class is asked for at the last step only, so
all that was shown must be remembered.

*Shapes*: xs (T, batch, pixels_per_step) float32; targets.label (T, batch) int32, the class at every step;
targets.weight (T, batch) float32, 1 at the last step and 0 elsewhere.

*Chance level*: 0.1 (the classes are balanced within 174 to 183 of 1,797).

*A perfect solver*: 1.0, though no classifier is known to reach it on a held-out part; logistic regression on
the whole image at once gets 0.978 of this test set.

*Source*: the test half of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository (1998), as ``sklearn.datasets.load_digits``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets, at_last_step

ROWS = 8
PIXELS = ROWS * ROWS
CLASSES = 10
CHANCE = 1 / CLASSES
TRAIN_SIZE = 1297


class Images(NamedTuple):
    """Images (count, 8, 8) in [0, 1] and their classes (count,)."""

    pixels: jax.Array
    label: jax.Array


def load(seed: int = 0) -> tuple[Images, Images]:
    """The training set (1,297 images) and the test set (500), split by one fixed permutation per ``seed``.

    Raises:
      ImportError: without scikit-learn, with the command that installs it.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("The digits are those of scikit-learn: pip install -e '.[experiments]'") from error
    pixels, label = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(label))
    images = Images((pixels / 16).reshape(-1, ROWS, ROWS).astype(np.float32)[order], label.astype(np.int32)[order])
    return (
        Images(*(jnp.asarray(part[:TRAIN_SIZE]) for part in images)),
        Images(*(jnp.asarray(part[TRAIN_SIZE:]) for part in images)),
    )


def sequences(images: Images, blank: int, pixels_per_step: int = ROWS) -> tuple[jax.Array, Targets]:
    """The images piece by piece, followed by ``blank`` steps of zeros; shapes as at the top of this file.

    Raises:
      ValueError: ``blank`` below 0, or ``pixels_per_step`` that does not divide the 64 pixels.
    """
    check_at_least(0, blank=blank)
    check_at_least(1, pixels_per_step=pixels_per_step)
    if PIXELS % pixels_per_step:
        raise ValueError(f"pixels_per_step must divide the {PIXELS} pixels of an image; seen {pixels_per_step}.")
    shown = images.pixels.reshape(-1, PIXELS // pixels_per_step, pixels_per_step)
    xs = jnp.pad(jnp.moveaxis(shown, 1, 0), ((0, blank), (0, 0), (0, 0)))
    return xs, at_last_step(images.label, len(xs))


def sample(
    key: jax.Array, images: Images, batch: int, blank: int, pixels_per_step: int = ROWS
) -> tuple[jax.Array, Targets]:
    """``batch`` images drawn with replacement, as sequences.

    Raises:
      ValueError: as ``sequences``, and ``batch`` below 1.
    """
    check_at_least(1, batch=batch)
    chosen = jax.random.randint(key, (batch,), 0, len(images.label))
    return sequences(jax.tree.map(lambda part: part[chosen], images), blank, pixels_per_step)
