"""How the tests of the tasks judge a statistic of random data."""

from __future__ import annotations

import numpy as np


def five_standard_errors(chance: float, count: int) -> float:
    """How far the mean of ``count`` independent events of probability ``chance`` may lie from it."""
    return 5 * np.sqrt(chance * (1 - chance) / count)


def linear_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy, on the second half, of the least squares fit of one-hot labels (count,) on the first half.

    Args:
      features: (count, ...), any shape behind; a constant is added.
      labels: (count,) int, classes from 0.
    """
    flat = np.concatenate([features.reshape(len(features), -1), np.ones((len(features), 1))], axis=1)
    half = len(labels) // 2
    weights, *_ = np.linalg.lstsq(flat[:half], np.eye(labels.max() + 1)[labels[:half]])
    return float(np.mean((flat[half:] @ weights).argmax(axis=1) == labels[half:]))
