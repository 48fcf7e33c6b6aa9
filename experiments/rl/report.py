"""The stored results of ``python -m experiments.rl`` as tables and pictures: docs/rl.md and docs/rl/*.png.

    python -m experiments.rl.report

Each task's table stands between two markers of the page, so that text can stand around it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.program import pages
from experiments.program.command import Parser
from experiments.program.pictures import band, open_axes, pyplot, save
from experiments.program.refusal import Refused

PAGE = pages.DOCS / "rl.md"
FOLDER = pages.DOCS / "rl"
KIND = "rl"
"""Of a section of the page: its title is "rl TASK"."""
# Rules that agree lie on top of each other, so the line below is the wider one.
LINES: dict[str, dict[str, Any]] = {"exact RTRL": {"linewidth": 4.0}, "R = 4": {"linewidth": 1.8, "linestyle": "--"}}
OTHERS = "#8c5a3c"
"""The colour of a rule that has none of its own."""
LAST = 10
"""Records that a final return is the mean of: a fifth of a run."""
HEADER = ("rule", "return at the end", "lowest to highest seed", "seeds at {threshold}", "steps to {threshold}")
Run = dict[str, Any]


def curves(run: Run) -> np.ndarray:
    """Mean return of the episodes that ended in each piece of the run, (seeds, records); nan where none ended."""
    return np.array([[math.nan if one is None else one for one in record] for record in run["return"]]).T


def final(run: Run) -> list[float]:
    """Of each seed, over the last records: the mean over their episodes."""
    weights, values = np.array(run["episodes"])[-LAST:].T, curves(run)[:, -LAST:]
    return [float(np.nansum(v * w) / w.sum()) for v, w in zip(values, weights, strict=True)]


def steps_to(run: Run, level: float) -> list[float]:
    """Of each seed the step of the first record from which on the mean of five is at the level; else infinite."""
    found = []
    for curve in curves(run):
        means = [np.nanmean(curve[i : i + 5]) for i in range(len(curve) - 4)]
        found.append(next((run["step"][i] for i, mean in enumerate(means) if mean >= level), math.inf))
    return found


def row(run: Run, best: float, threshold: float) -> list[str]:
    """A row of the table, in the order of ``HEADER``."""
    values, level = final(run), threshold * best
    middle = statistics.median(steps_to(run, level))
    digits = 0 if best > 10 else 2
    return [
        run["rule"],
        f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}",
        f"{min(values):.{digits}f} to {max(values):.{digits}f}",
        f"{sum(value >= level for value in values)} of {len(values)}",
        f"{middle:,.0f}" if math.isfinite(middle) else f"> {run['step'][-1]:,}",
    ]


def markdown(result: dict[str, Any]) -> str:
    """The table of a task."""
    best, threshold = result["best"], result["threshold"]
    names = [name.format(threshold=f"{threshold * best:g}") for name in HEADER]
    rows = [row(run, best, threshold) for run in result["runs"]]
    seeds = len(result["settings"]["seeds"])
    note = f"`{result['command']}`, commit {result['commit']}; {seeds} seeds, mean ± standard deviation."
    missing = f"\n\nNot run yet: {', '.join(result['missing'])}." if result["missing"] else ""
    return f"{note}\n\n{pages.table(names, rows)}{missing}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Return over steps, a band from the worst seed to the best; pieces are put together by fives."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.set_prop_cycle(color=[OTHERS])
    for run in result["runs"]:
        values = curves(run)
        whole = values.shape[1] // 5 * 5
        smooth = np.nanmean(values[:, :whole].reshape(len(values), -1, 5), axis=2)
        band(axis, np.array(run["step"])[4:whole:5], smooth, run["rule"], **LINES.get(run["rule"], {}))
    axis.axhline(result["threshold"] * result["best"], color="0.8", linewidth=0.8, zorder=0)
    axis.set_title(result["title"], loc="left", fontsize=10)
    axis.set_xlabel("steps, an update at each")
    axis.set_ylabel("return of an episode")
    axis.legend(frameon=False, fontsize=8)
    open_axes(axis)
    save(figure, path)


def fill(page: str, folder: Path) -> str:
    """The page with the table and the picture of every task that it names.

    Raises:
      Refused: half of a section.
    """
    for name in pages.names(page, KIND):
        path = folder / f"{name}.json"
        body = f"Not run yet: `python -m experiments.rl {name}`."
        if path.exists():
            result = json.loads(path.read_text())
            body = f"{markdown(result)}\n\n![{result['title']}](rl/{name}.png)"
        page = pages.fill(page, f"{KIND} {name}", body)
    return page


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures; returns the exit status, 2 for a page that cannot be filled."""
    Parser("experiments.rl.report", __doc__).parse_args(arguments)
    try:
        filled = fill(PAGE.read_text(), FOLDER)
    except Refused as error:
        print(f"error: {PAGE}: {error}", file=sys.stderr)
        return 2
    for path in sorted(FOLDER.glob("*.json")):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    PAGE.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
