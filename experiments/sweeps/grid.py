"""A sweep: one task under several rules or settings, and what each run's command line is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

COMMAND = "python -m experiments.sweeps"
"""And the sweep's name."""
MEASURES = {"test accuracy": "test_accuracy", "bits per character": "test_loss"}
"""The figure of a line of metrics that a measure is made of."""


class Sweep(NamedTuple):
    """One task under several rules, or under one rule with several settings.

    Attributes:
      title: for tables and pictures.
      config: file of the training configuration.
      fixed: fields set for all runs.
      grid: fields and their values; every combination is run. ``seed`` and ``compared`` are among them.
      threshold: of the measure, for the number of batches to it.
      measure: what is shown of the test set, a key of ``MEASURES``.
      compared: the field whose values stand side by side: a row of a table and a curve each.
      by_rule: fields set for one rule's runs only.
    """

    title: str
    config: str
    fixed: dict[str, Any]
    grid: dict[str, tuple]
    threshold: float = 0.9
    measure: str = "test accuracy"
    compared: str = "rule"
    by_rule: Mapping[str, dict[str, Any]] = MappingProxyType({})

    def runs(self) -> Iterator[dict[str, Any]]:
        """The fields of every run that are not fixed."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def arguments(self, run: dict[str, Any], folder: Path) -> list[str]:
        """The command line of the training program."""
        of_rule = self.by_rule.get(run.get("rule", ""), {})
        fields = [f"--config.{name}={value}" for name, value in {**self.fixed, **of_rule, **run}.items()]
        return [f"--config={self.config}", *fields, f"--workdir={folder / slug(run)}"]


def slug(run: dict[str, Any]) -> str:
    """A folder's name for a run."""
    words = [f"{name.split('.')[-1]}={value}" for name, value in run.items()]
    return ",".join(words).replace(" ", "")
