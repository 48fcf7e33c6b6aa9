"""Every rule at its own best learning rate, from the stored results of the sweeps over learning rates.

    python -m experiments.studies.rates

A rate is best for a rule where the mean over seeds of the test accuracy at the end is highest, or that of bits per
character lowest; of two equal ones the smaller. The best of a few rates is chosen by what is shown, so single figures
are a little too good, for every rule alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from experiments.program import pages
from experiments.program.command import Parser
from experiments.sweeps.results import Run, final, groups, stored

PAGE = pages.EXPERIMENTS
RULES = ("BPTT", "deep e-prop", "hops = 0", "immediate only", "lower frozen")
RATE = "learning_rate"
ACCURACY = "test accuracy"


def best(by_rate: dict[float, list[Run]]) -> tuple[float, float]:
    """The measure at the end, the mean over seeds at the best rate, and that rate."""
    means = {rate: statistics.mean(final(runs)) for rate, runs in by_rate.items()}
    bits = any("test_loss" in run for runs in by_rate.values() for run in runs)
    rate = (min if bits else max)(sorted(means), key=means.__getitem__)
    return means[rate], rate


def row(result: dict[str, Any]) -> list[str] | None:
    """A sweep's row; None for a sweep of something else than rules at several rates."""
    if any(run["fields"].keys() != {RATE, "rule", "seed"} for run in result["runs"]):
        return None
    rates: dict[str, dict[float, list[Run]]] = {}
    for setting, rules in groups(result["runs"]).items():
        for rule, runs in rules.items():
            rates.setdefault(rule, {})[dict(setting)[RATE]] = runs
    cells = []
    for rule in RULES:
        value, rate = best(rates[rule]) if rule in rates else (None, None)
        cells.append("–" if value is None else f"{value:.3f} ({rate:g})")
    measure = result.get("measure", ACCURACY)
    return [result["title"] + ("" if measure == ACCURACY else f", {measure}"), *cells]


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """The table."""
    rows = [cells for cells in map(row, results) if cells]
    head = ["task", *(f"{rule} (rate)" for rule in RULES)]
    words = "`python -m experiments.studies.rates`: test accuracy where nothing else is said, mean over seeds."
    return f"{words}\n\n{pages.table(head, rows)}"


def fill(page: str, results: Iterable[dict[str, Any]]) -> str:
    """The page with the table between its markers."""
    return pages.fill(page, "rates", markdown(results))


def main(arguments: list[str] | None = None) -> None:
    """Write the section."""
    Parser("experiments.studies.rates", __doc__).parse_args(arguments)
    PAGE.write_text(fill(PAGE.read_text(), stored()))


if __name__ == "__main__":
    main()
