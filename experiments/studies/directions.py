"""What is learnt, and how far the gradient is from BPTT's, against the number of directions of a projected carry.

    python -m experiments.studies.directions

From the stored results of the sweeps with R = 1, 2, 4 and 8.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.program.command import Parser
from experiments.program.pictures import open_axes, pyplot, save
from experiments.sweeps.results import FOLDER, Run, final, groups, stored

RANKS = (1, 2, 4, 8)
PICTURE = FOLDER / "directions.png"


def results() -> dict[str, dict[str, list[Run]]]:
    """By task, the runs of every rule, of the sweeps that have all ranks beside BPTT."""
    found: dict[str, dict[str, list[Run]]] = {}
    for result in stored():
        names = {str(run["fields"].get("rule")) for run in result["runs"]}
        if {"BPTT", *(f"R = {rank}" for rank in RANKS)} <= names:
            (rules,) = groups(result["runs"]).values()
            found[result["command"].split()[-1].removeprefix("projected_")] = rules
    return found


def error_in_the_middle(runs: list[Run]) -> float:
    """The relative error of the lowest layer's gradient half way through training, median over seeds."""
    middle = sorted(map(int, runs[0]["layers"]))[1]
    lowest: list[Any] = [run["layers"][str(middle)][0]["relative_error"] for run in runs]
    return statistics.median(value for value in lowest if value is not None)


def draw(found: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Accuracy and error against R, a line for each task; BPTT's accuracy as a tick at the right."""
    figure, (learnt, error) = pyplot.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    for number, (task, rules) in enumerate(found.items()):
        colour = f"C{number}"
        learnt.plot(RANKS, [statistics.mean(final(rules[f"R = {rank}"])) for rank in RANKS], "o-", color=colour)
        learnt.plot([9.5], [statistics.mean(final(rules["BPTT"]))], "_", markersize=12, color=colour)
        errors = [error_in_the_middle(rules[f"R = {rank}"]) for rank in RANKS]
        error.plot(RANKS, errors, "o-", color=colour, label=task)
    for axis, words in ((learnt, "test accuracy (at the right: BPTT)"), (error, "relative error, lowest layer")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, map(str, RANKS))
        axis.set_xlabel("directions R")
        axis.set_ylabel(words)
        open_axes(axis)
    error.legend(frameon=False, fontsize=7)
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    Parser("experiments.studies.directions", __doc__).parse_args(arguments)
    draw(results(), PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
