"""Results as a table for the terminal, a table for the README, and learning curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from experiments.demo.several_seeds import Record
from experiments.program import pages
from experiments.program.pictures import band, open_axes, pyplot, save

# Rules that agree lie on top of each other, so the line below is the wider one and the one above is dashed.
LINES = {
    "BPTT": {"linewidth": 3.6},
    "exact RTRL": {"linewidth": 1.8, "linestyle": (0, (3, 3)), "zorder": 3},
}
HEADER = ("rule", "test accuracy", "updates to {threshold}", "cosine", "norm ratio", "ms per step", "trace bytes")


@dataclasses.dataclass
class Result:
    """What is known of one rule on one task; every part may be missing yet."""

    records: list[Record] = dataclasses.field(default_factory=list)
    trace_bytes: int | None = None
    milliseconds_per_step: float | None = None

    def row(self, rule: str, threshold: float) -> list[str]:
        """The row of the table, in the order of ``HEADER``."""
        return [
            rule,
            self._accuracy(),
            self._updates_to(threshold),
            self._median("cosine"),
            self._median("norm_ratio"),
            "" if self.milliseconds_per_step is None else f"{self.milliseconds_per_step:.3f}",
            "–" if self.trace_bytes is None else f"{self.trace_bytes:,}",
        ]

    def _accuracy(self) -> str:
        if not self.records:
            return ""
        last = self.records[-1].accuracy
        return f"{last.mean():.3f} ± {last.std():.3f}"

    def _updates_to(self, threshold: float) -> str:
        """The first record whose accuracy, averaged over the seeds, is at the threshold or above."""
        if not self.records:
            return ""
        reached = [record.update for record in self.records if record.accuracy.mean() >= threshold]
        return str(reached[0]) if reached else f"> {self.records[-1].update}"

    def _median(self, field: str) -> str:
        """Over all records and seeds, that is, along the rule's own training."""
        if not self.records:
            return ""
        median = np.median([getattr(record, field) for record in self.records])
        return f"{median:.2f}" if np.isfinite(median) else "–"


def _header(threshold: float) -> list[str]:
    return [title.format(threshold=f"{threshold:.0%}") for title in HEADER]


def rich_table(title: str, results: dict[str, Result], threshold: float) -> Table:
    """For the terminal."""
    # Narrow enough for a terminal of 80 columns.
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for index, name in enumerate(_header(threshold)):
        table.add_column(name, justify="right" if index else "left", no_wrap=index < 2)
    for rule, result in results.items():
        table.add_row(*result.row(rule, threshold))
    return table


def markdown_table(title: str, results: dict[str, Result], threshold: float) -> str:
    """For the README."""
    rows = [result.row(rule, threshold) for rule, result in results.items()]
    return f"**{title}**\n\n{pages.table(_header(threshold), rows)}"


def draw_curves(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Test accuracy over updates: a panel for each task, a line for each rule, a band from worst seed to best."""
    figure, axes = pyplot.subplots(1, len(results), figsize=(5.2 * len(results), 3.6), layout="constrained")
    for axis, (title, rules) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for rule, result in rules.items():
            if not result.records:
                continue
            updates = [record.update for record in result.records]
            accuracy = np.array([record.accuracy for record in result.records]).T
            band(axis, updates, accuracy, rule, edge=0, **LINES.get(rule, {}))
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("updates")
        axis.set_ylim(0, 1.02)
        open_axes(axis)
        axis.grid(axis="y", color="#e5e5e5")
        axis.set_axisbelow(True)
    np.atleast_1d(axes)[0].set_ylabel("test accuracy")
    np.atleast_1d(axes)[0].legend(frameon=False, loc="lower right")
    save(figure, path, dpi=160)
