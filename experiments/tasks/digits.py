"""Handwritten digits, fed row by row, answered after a blank delay.

The 1,797 digits of 8 × 8 pixels (0 to 16 ink levels) that scikit-learn ships: the test half of "Optical Recognition of
Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998).

One example is a sequence of T = 8 + blank steps: step t < 8 shows row t of the image (8 numbers in [0, 1], top row
first), the steps after that show zeros. The class is asked for at the last step only, so every row must be remembered.

*Shapes*: xs (T, batch, 8) float32; targets.label (T, batch) int32, the class at every step; targets.weight (T, batch)
float32, 1 at the last step and 0 elsewhere.

*Chance level*: 0.1 (the classes are balanced within 174 to 183 of 1,797).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from experiments.tasks.targets import Targets, at_last_step

ROWS = 8
CLASSES = 10
CHANCE = 1 / CLASSES
TRAIN_SIZE = 1297


class Images(NamedTuple):
    """Images (count, 8, 8) in [0, 1] and their classes (count,)."""

    pixels: jax.Array
    label: jax.Array


def load(seed: int = 0) -> tuple[Images, Images]:
    """The training set (1,297 images) and the test set (500), split by one fixed permutation per ``seed``."""
    pixels, label = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(label))
    images = Images((pixels / 16).reshape(-1, ROWS, ROWS).astype(np.float32)[order], label.astype(np.int32)[order])
    return (
        Images(*(jnp.asarray(part[:TRAIN_SIZE]) for part in images)),
        Images(*(jnp.asarray(part[TRAIN_SIZE:]) for part in images)),
    )


def sequences(images: Images, blank: int) -> tuple[jax.Array, Targets]:
    """The images as sequences of rows, followed by ``blank`` steps of zeros; shapes as at the top of this file."""
    rows = jnp.moveaxis(images.pixels, 1, 0)
    xs = jnp.concatenate([rows, jnp.zeros((blank, *rows.shape[1:]), rows.dtype)])
    return xs, at_last_step(images.label, len(xs))


def sample(key: jax.Array, images: Images, batch: int, blank: int) -> tuple[jax.Array, Targets]:
    """``batch`` images drawn with replacement, as sequences."""
    chosen = jax.random.randint(key, (batch,), 0, len(images.label))
    return sequences(jax.tree.map(lambda part: part[chosen], images), blank)
