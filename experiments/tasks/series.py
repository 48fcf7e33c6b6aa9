"""Recordings of many channels, asked for their class at the last step: two sets of the UEA archive.

    name             classes   channels   steps T   for training   for the test
    JapaneseVowels   9         12         25        270            370
    BasicMotions     4         6          100       40             40

JapaneseVowels: nine men say /ae/; 12 cepstral coefficients a step, resampled to 25 steps; who is it? BasicMotions: a
watch's accelerometer and gyroscope while its wearer stands, runs, walks or plays badminton. The split is the archive's.

Each channel is shifted and scaled to mean 0 and variance 1 over the training set. The class is asked for at the last
step only.

*Shapes*: xs (T, batch, channels) float32; targets.label (T, batch) int32, the class at every step; targets.weight
(T, batch) float32, 1 at the last step and 0 elsewhere.

*Chance level*: 1/9 and 1/4 (0.24 of JapaneseVowels' test set, where the classes are not balanced, are of the largest).

*A perfect solver*: 1.0.

*Source*: M. Kudo, J. Toyama, M. Shimbo, "Multidimensional curve classification using passing-through regions", Pattern
Recognition Letters 20 (1999); A. Bagnall et al., "The UEA multivariate time series classification archive, 2018",
arXiv:1811.00075. Read from the files that the package aeon ships; aeon itself is not imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.program.refusal import check_name
from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets, at_last_step

SETS = {"JapaneseVowels": "JapaneseVowels_eq", "BasicMotions": "BasicMotions"}
"""The names here, and the files' there (of equal length)."""


class NoRecordings(ImportError):
    """The files are not there."""


class Recordings(NamedTuple):
    """Values (count, T, channels) and classes (count,)."""

    values: jax.Array
    label: jax.Array


def folder() -> Path:
    """Where aeon keeps its data.

    Raises:
      NoRecordings: it is not installed.
    """
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise NoRecordings(
            "The recordings are files of the package aeon, which is not installed: pip install --no-deps aeon==1.6.0 "
            "(its files are all that is needed)."
        )
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def read(path: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Values (count, T, channels), the class of each and all classes, from a ``.ts`` file of equal length.

    A line is a recording: channels separated by colons, each its steps separated by commas; the class comes last.

    Raises:
      ValueError: recordings of several shapes, or a class that the head does not name.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    head = [line.split() for line in lines if line.startswith("@")]
    classes = next(words[2:] for words in head if words[0].lower() == "@classlabel")
    parts = [line.split(":") for line in lines if line and line[0] not in "@#"]
    values = [np.array([channel.split(",") for channel in channels], np.float64).T for *channels, _ in parts]
    shapes = sorted({value.shape for value in values})
    if len(shapes) != 1:
        raise ValueError(f"{path.name} must hold recordings of one shape (T, channels); seen {shapes}.")
    label = [name for *_, name in parts]
    if unknown := sorted(set(label) - set(classes)):
        raise ValueError(f"{path.name} names the classes {classes}; seen {unknown}.")
    return np.stack(values), label, classes


def load(name: str) -> tuple[Recordings, Recordings, int]:
    """The training set, the test set and the number of classes.

    Args:
      name: a key of ``SETS``.

    Raises:
      Refused: another name.
      NoRecordings: aeon's files are not there.
    """
    check_name("set of recordings", name, SETS)
    files = [folder() / name / f"{SETS[name]}_{part}.ts" for part in ("TRAIN", "TEST")]
    if missing := [path.name for path in files if not path.exists()]:
        raise NoRecordings(f"The installed aeon has no {' and no '.join(missing)}: pip install --no-deps aeon==1.6.0")
    (train, train_label, classes), (test, test_label, _) = (read(path) for path in files)
    mean, scale = train.mean((0, 1)), train.std((0, 1))

    def recordings(values: np.ndarray, label: list[str]) -> Recordings:
        numbers = [classes.index(each) for each in label]
        return Recordings(jnp.asarray((values - mean) / scale, jnp.float32), jnp.asarray(numbers, jnp.int32))

    return recordings(train, train_label), recordings(test, test_label), len(classes)


def sequences(recordings: Recordings) -> tuple[jax.Array, Targets]:
    """All of them, side by side; shapes as at the top of this file."""
    xs = jnp.moveaxis(recordings.values, 1, 0)
    return xs, at_last_step(recordings.label, len(xs))


def sample(key: jax.Array, recordings: Recordings, batch: int) -> tuple[jax.Array, Targets]:
    """``batch`` recordings drawn with replacement.

    Raises:
      ValueError: ``batch`` below 1.
    """
    check_at_least(1, batch=batch)
    chosen = jax.random.randint(key, (batch,), 0, len(recordings.label))
    return sequences(jax.tree.map(lambda part: part[chosen], recordings))
