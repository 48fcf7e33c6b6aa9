"""Every rule at its own best learning rate, from the stored results of the sweeps over learning rates.

    python -m experiments.rates_report

A rate is best for a rule where the mean over seeds of the test accuracy at the end is highest, the smaller of two
equal ones. The best of a few rates is chosen by what is shown, so single figures are a little too good, for every rule
alike.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from typing import Any

from experiments.cosine_report import stored
from experiments.sweep_report import PAGE, Run, final, groups

SECTION = re.compile(r"(<!-- rates: [^\n]*-->\n).*?(<!-- end of rates -->)", re.DOTALL)
RULES = ("BPTT", "deep e-prop", "hops = 0", "immediate only", "lower frozen")
RATE = "learning_rate"


def best(by_rate: dict[float, list[Run]]) -> tuple[float, float]:
    """The accuracy at the end, the mean over seeds at the best rate, and that rate."""
    means = {rate: statistics.mean(final(runs)) for rate, runs in by_rate.items()}
    rate = max(sorted(means), key=means.__getitem__)
    return means[rate], rate


def row(result: dict[str, Any]) -> list[str] | None:
    """A sweep's row; None for a sweep of something else than the accuracy of rules at several rates."""
    if result.get("measure", "test accuracy") != "test accuracy":
        return None
    if any(run["fields"].keys() != {RATE, "rule", "seed"} for run in result["runs"]):
        return None
    rates: dict[str, dict[float, list[Run]]] = {}
    for setting, rules in groups(result["runs"]).items():
        for rule, runs in rules.items():
            rates.setdefault(rule, {})[dict(setting)[RATE]] = runs
    cells = []
    for rule in RULES:
        accuracy, rate = best(rates[rule]) if rule in rates else (None, None)
        cells.append("–" if accuracy is None else f"{accuracy:.3f} ({rate:g})")
    return [result["title"], *cells]


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """The table."""
    rows = [cells for cells in map(row, results) if cells]
    head = ["task", *(f"{rule} (rate)" for rule in RULES)]
    lines = ["`python -m experiments.rates_report`: test accuracy, mean over seeds.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * len(RULES) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def fill(page: str, results: Iterable[dict[str, Any]]) -> str:
    """The page with the table between its markers."""
    body = markdown(results)
    return SECTION.sub(lambda part: part[1] + body + "\n" + part[2], page)


def main() -> None:
    """Write the section."""
    PAGE.write_text(fill(PAGE.read_text(), stored()))


if __name__ == "__main__":
    main()
