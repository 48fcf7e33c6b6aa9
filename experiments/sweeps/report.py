"""The stored results of all sweeps as tables and pictures: docs/logs/experiments/ and docs/experiments/*.png.

    python -m experiments.sweeps.report

Tables stand between markers in the log, so that text can stand around them; a sweep that has none yet gets a section
at the end of its README.md. A test checks that the tables are those of the stored results.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from experiments.program import pages
from experiments.program.command import Parser
from experiments.program.pictures import band, open_axes, pyplot, save
from experiments.program.refusal import Refused
from experiments.sweeps.grid import COMMAND
from experiments.sweeps.results import NOTHING, Run, batches_to, curve, final, gap_closed, groups

PAGE = pages.EXPERIMENTS
KIND = "sweep"
"""Of a section of the page: its title is "sweep NAME"."""
HEADER = (
    "{compared}",
    "{measure}",
    "lowest to highest seed",
    "batches to {threshold}",
    "gap closed",
    "cosine",
    "norm ratio",
)
COLUMNS = 3
"""Panels of a picture side by side."""


def field_name(field: str) -> str:
    """A field of a configuration as it is shown."""
    return field.split(".")[-1].replace("_", " ")


def row(rule: str, rules: dict[str, list[Run]], threshold: float) -> list[str]:
    """A row of the table, in the order of ``HEADER``."""
    runs = rules[rule]
    values, reached = final(runs), [batches_to(run, threshold) for run in runs]
    middle, gap = statistics.median(reached), gap_closed(runs, rules)
    return [
        rule,
        f"{np.mean(values):.3f} ± {np.std(values):.3f}",
        f"{min(values):.3f} to {max(values):.3f}",
        f"{middle:.0f}" if np.isfinite(middle) else f"> {runs[0]['batch'][-1]}",
        "–" if gap is None else f"{round(gap, 2) + 0.0:.2f}",  # 0.00, never -0.00
        " ".join(_layers(runs, "cosine")),
        " ".join(_layers(runs, "norm_ratio")),
    ]


def _layers(runs: list[Run], figure: str) -> list[str]:
    """Of the first gradient, bottom layer to top: the median over seeds, of a cosine where there is a gradient."""
    firsts = [run["layers"]["0"] for run in runs]
    shown = []
    for layer in range(len(firsts[0])):
        gradients = [first[layer] for first in firsts]
        if figure == "cosine":
            gradients = [one for one in gradients if one["cosine"] is not None and one["norm_ratio"] >= NOTHING]
        values = [one[figure] for one in gradients if one[figure] is not None]
        shown.append(f"{statistics.median(values):.2f}" if values else "–")
    return shown


def markdown(name: str, result: dict[str, Any]) -> str:
    """All tables of a sweep."""
    seeds = len({run["fields"]["seed"] for run in result["runs"]})
    compared = result.get("compared", "rule")
    number = "one seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation"
    parts = [f"`{COMMAND} {name}`, commit {result['commit']}; {number}."]
    for setting, rules in groups(result["runs"], compared).items():
        title = ", ".join([result["title"], *(f"{field_name(name)} {value}" for name, value in setting)])
        measure = result.get("measure", "test accuracy")
        threshold = f"{result['threshold']:.0%}" if measure == "test accuracy" else f"{result['threshold']} bits"
        words = {"compared": field_name(compared), "measure": measure, "threshold": threshold}
        names = [name.format(**words) for name in HEADER]
        rows = [row(rule, rules, result["threshold"]) for rule in rules]
        gap = HEADER.index("gap closed")
        if all(cells[gap] == "–" for cells in rows):  # without the controls
            names, rows = names[:gap] + names[gap + 1 :], [cells[:gap] + cells[gap + 1 :] for cells in rows]
        parts += [f"**{title}**", pages.table(names, rows)]
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """The measure over batches, a panel for each setting; a band from the worst seed to the best."""
    compared = result.get("compared", "rule")
    panels = groups(result["runs"], compared)
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", sharey=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (setting, rules) in zip(axes.flat, panels.items(), strict=False):
        for rule, runs in rules.items():
            band(axis, runs[0]["batch"], np.array([curve(run) for run in runs]), rule)
        words = [f"{field_name(name)} {value}" for name, value in setting]
        axis.set_title(", ".join(words) or result["title"], loc="left", fontsize=10)
        axis.set_xlabel("batches")
        open_axes(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel(result.get("measure", "test accuracy"))
    axes[0, 0].legend(frameon=False, fontsize=8, title=None if compared == "rule" else field_name(compared))
    save(figure, path)


def fill(page: str, folder: Path) -> str:
    """The page with every stored sweep's tables between its markers.

    A stored sweep without a section gets one, at the end of the page.

    Raises:
      Refused: half of a section.
    """

    def section(name: str) -> str:
        path = folder / f"{name}.json"
        if not path.exists():
            return f"Not run yet: `{COMMAND} {name}`."
        result = json.loads(path.read_text())
        return f"{markdown(name, result)}\n\n![{result['title']}](../../experiments/{name}.png)"

    for name in without_section(page, folder):
        title = json.loads((folder / f"{name}.json").read_text())["title"]
        page = pages.add(page, f"{KIND} {name}", title, "python -m experiments.sweeps.report")
    for name in pages.names(page, KIND):
        page = pages.fill(page, f"{KIND} {name}", section(name))
    return page


def without_section(page: str, folder: Path) -> list[str]:
    """The stored sweeps that the page does not show yet."""
    return sorted({path.stem for path in folder.glob("*.json")} - set(pages.names(page, KIND)))


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures; returns the exit status, 2 for a page that cannot be filled."""
    Parser("experiments.sweeps.report", __doc__).parse_args(arguments)
    page, folder = PAGE.read_text(), PAGE.parent / "experiments"
    new = without_section(page, folder)
    try:
        filled = fill(page, folder)
    except Refused as error:
        print(f"error: {PAGE}: {error}", file=sys.stderr)
        return 2
    for path in track(sorted(folder.glob("*.json")), "pictures"):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    PAGE.write_text(filled)
    for name in new:
        print(f"{PAGE}: {name} has a section now, at the end (README.md); move it, with both markers, to its place.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
