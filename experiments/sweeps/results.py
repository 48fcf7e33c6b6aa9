"""The stored results of the sweeps, and the figures that reports and studies make of them."""

from __future__ import annotations

import json
import math
import operator
import statistics
from collections.abc import Iterable
from typing import Any

from experiments.program import pages

FOLDER = pages.EXPERIMENTS.parent / "experiments"
NOTHING = 1e-4
"""Of the norm ratio: a gradient below is none, and its cosine is rounding."""
Run = dict[str, Any]


def stored() -> list[dict[str, Any]]:
    """All stored sweeps, by name."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def curve(run: Run) -> list[float]:
    """What is shown of the test set, over batches: accuracy, or of a loss in nats the bits; nan for one not finite."""
    if "test_loss" in run:
        return [math.nan if loss is None else loss / math.log(2) for loss in run["test_loss"]]
    return run["test_accuracy"]


def groups(runs: Iterable[Run], compared: str = "rule") -> dict[tuple, dict[str, list[Run]]]:
    """By setting (all fields but seed and the one compared), then by what is compared: the runs of all seeds."""
    found: dict[tuple, dict[str, list[Run]]] = {}
    for run in runs:
        setting = tuple((name, value) for name, value in run["fields"].items() if name not in (compared, "seed"))
        found.setdefault(setting, {}).setdefault(str(run["fields"][compared]), []).append(run)
    return found


def final(runs: list[Run]) -> list[float]:
    """The last of each seed's curve."""
    return [curve(run)[-1] for run in runs]


def batches_to(run: Run, threshold: float) -> float:
    """The first evaluation at the threshold or better; infinite where there is none."""
    better = operator.le if "test_loss" in run else operator.ge
    pairs = zip(run["batch"], curve(run), strict=True)
    return next((batch for batch, value in pairs if better(value, threshold)), float("inf"))


def gap_closed(rule: list[Run], rules: dict[str, list[Run]]) -> float | None:
    """(rule − frozen) / (BPTT − frozen) of means over seeds; None without both, or where BPTT is not 0.02 better."""
    if "BPTT" not in rules or "lower frozen" not in rules:
        return None
    top, bottom, own = (statistics.mean(final(runs)) for runs in (rules["BPTT"], rules["lower frozen"], rule))
    gain = bottom - top if "test_loss" in rule[0] else top - bottom
    return (own - bottom) / (top - bottom) if gain > 0.02 else None
