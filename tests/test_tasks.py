"""The data of the experiments are what their docstrings say: balanced, silent, invisible to linear readouts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from experiments.tasks import digits
from experiments.tasks.targets import Targets, at_last_step, cross_entropy

BLANK = 8


@pytest.fixture(scope="module")
def images() -> tuple[digits.Images, digits.Images]:
    return digits.load()


def held_out_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Of a linear classifier fitted on the first half, on the second."""
    half = len(labels) // 2
    return (
        LogisticRegression(C=0.1, max_iter=500)
        .fit(features[:half], labels[:half])
        .score(features[half:], labels[half:])
    )


def test_targets_ask_at_the_last_step_only() -> None:
    targets = at_last_step(jnp.array([3, 1]), 4)
    np.testing.assert_array_equal(targets.label, [[3, 1]] * 4)
    np.testing.assert_array_equal(targets.weight, [[0, 0]] * 3 + [[1, 1]])


def test_cross_entropy_is_weighted_and_averaged_over_the_batch() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    loss = cross_entropy(logits, Targets(jnp.array([0, 0]), jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(loss, np.log(4) / 2, rtol=1e-6)


def test_digits_are_the_same_fixed_split_of_all_images(images: tuple[digits.Images, digits.Images]) -> None:
    train, test = images
    assert (train.pixels.shape, test.pixels.shape) == ((1297, 8, 8), (500, 8, 8))
    assert float(train.pixels.min()) == 0 and float(train.pixels.max()) == 1
    again = digits.load()[1]
    np.testing.assert_array_equal(test.pixels, again.pixels)
    counts = np.bincount(np.concatenate([train.label, test.label]))
    assert counts.shape == (10,) and counts.min() == 174 and counts.max() == 183
    # The test set alone is balanced well enough that guessing one class stays near chance.
    assert np.bincount(test.label).max() / 500 < digits.CHANCE + 0.03


def test_digits_show_their_rows_from_the_top_and_then_nothing(images: tuple[digits.Images, digits.Images]) -> None:
    xs, targets = digits.sequences(images[1], BLANK)
    assert xs.shape == (8 + BLANK, 500, 8)
    np.testing.assert_array_equal(xs[:8].transpose(1, 0, 2), images[1].pixels)
    assert not xs[8:].any()
    np.testing.assert_array_equal(targets.label[-1], images[1].label)


def test_digits_need_more_than_one_row(images: tuple[digits.Images, digits.Images]) -> None:
    """No single row tells the class; all rows together do."""
    pixels, labels = np.asarray(images[0].pixels), np.asarray(images[0].label)
    assert max(held_out_accuracy(pixels[:, row], labels) for row in range(8)) < 0.65
    assert held_out_accuracy(pixels.reshape(-1, 64), labels) > 0.9


def test_digits_are_sampled_by_key_alone(images: tuple[digits.Images, digits.Images]) -> None:
    sample = jax.jit(lambda key: digits.sample(key, images[0], 4, BLANK))
    first, again, other = sample(jax.random.key(1)), sample(jax.random.key(1)), sample(jax.random.key(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != other[0]).any()
