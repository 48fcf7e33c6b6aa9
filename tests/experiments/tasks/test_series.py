"""Recordings: the files are read as they are written, and what is missing or wrong is said."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.program.refusal import Refused
from experiments.tasks import series
from experiments.training import settings
from tests.experiments.conftest import TRAIN


def test_channels_are_scaled_by_the_training_set(recordings: Path) -> None:
    train, test, classes = series.load("BasicMotions")
    assert (train.values.shape, test.values.shape, classes) == ((3, 3, 2), (1, 3, 2), 2)
    np.testing.assert_allclose(train.values.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(train.values.std((0, 1)), 1, rtol=1e-6)
    np.testing.assert_array_equal(test.values[0], train.values[0])
    np.testing.assert_array_equal(train.label, [0, 1, 1])
    np.testing.assert_array_equal(test.label, [1])
    # Steps run along the lines: the first channel of the first recording rises.
    assert (np.diff(train.values[0, :, 0]) > 0).all()


def test_a_batch_asks_at_the_last_step(recordings: Path) -> None:
    train, _, _ = series.load("JapaneseVowels")
    xs, targets = series.sample(jax.random.key(0), train, 50)
    assert (xs.shape, targets.label.shape) == ((3, 50, 2), (3, 50))
    np.testing.assert_array_equal(targets.weight.sum(1), [0, 0, 50])
    # Every example is a recording with its own class.
    for index in range(50):
        distances = np.abs(np.asarray(train.values) - np.asarray(xs)[:, index]).max((1, 2))
        assert distances.min() == 0 and train.label[distances.argmin()] == targets.label[0, index]
    with pytest.raises(ValueError, match="batch must be"):
        series.sample(jax.random.key(0), train, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRAIN + "1,2:3,4:low\n", "of one shape"),
        (TRAIN + "1,2,3:3,4,5:middle\n", "middle"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.ts").write_text(text)
    with pytest.raises(ValueError, match=message):
        series.read(tmp_path / "wrong.ts")


def test_what_is_missing_is_said_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="Did you mean 'BasicMotions'"):
        series.load("BasicMotion")
    monkeypatch.setattr(series.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install --no-deps aeon"):
        settings.make(settings.read(["--config=configs/series.py"])[0])
    monkeypatch.setattr(series, "folder", lambda: tmp_path)
    with pytest.raises(ImportError, match="JapaneseVowels_eq_TRAIN"):
        series.load("JapaneseVowels")
