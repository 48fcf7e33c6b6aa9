"""Put the measured accuracies into README.md, between their markers.

    python -m experiments.demo.readme

Reads docs/demo.md, which ``python -m experiments.demo --out docs`` writes, and shows of it what needs no explanation.
"""

from __future__ import annotations

import re

from experiments.program import pages
from experiments.program.command import Parser
from experiments.program.refusal import Refused

ROOT = pages.DOCS.parent
MEANING = {
    "BPTT": ("BPTT", "backpropagation through time, offline"),
    "exact RTRL": ("`exact=True`", "all of the gradient, forward in time"),
    "deep e-prop": ("`deep_eprop(network)`", "deep e-prop"),
    "R = 4": ("`carry_rank=4`", "credit along four learnt directions"),
    "random feedback": (
        "`signals=`, random feedback",
        "deep e-prop; random weights in place of the readout's, on the way down",
    ),
    "hops = 0": ("`hops=0`", "traces in a parameter's own layer alone"),
    "lower frozen": ("control", "the lowest layer is not trained"),
}
"""Per rule of the demo its name in README, and what it is."""


def table(tables: str) -> str:
    """README's table, from docs/demo.md.

    Raises:
      Refused: docs/demo.md has other tables or rules.
    """
    blocks = re.findall(r"^\*\*(.+)\*\*\n\n\|.*\n\|.*\n((?:\|.*\n?)+)", tables, re.MULTILINE)
    found = [{row[0]: row for row in map(_cells, body.splitlines())} for _, body in blocks]
    if len(found) != 2 or any(set(rules) != set(MEANING) for rules in found):
        raise Refused(
            f"docs/demo.md must have two tables with the rules {', '.join(MEANING)}; seen {[list(f) for f in found]}. "
            "Write it anew: python -m experiments.demo --out docs"
        )
    digits, counting = found
    rows = [(*MEANING[rule], digits[rule][1], counting[rule][1], digits[rule][5]) for rule in MEANING]
    return pages.table(("rule", "what it is", "digits", "counting", "ms per step, digits"), rows, words=2)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def insert(readme: str, tables: str) -> str:
    """The README with its table between its markers.

    Raises:
      Refused: the markers are missing, or docs/demo.md has other tables.
    """
    return pages.fill(readme, "demo.md", table(tables))


def main(arguments: list[str] | None = None) -> None:
    """Write README.md."""
    Parser("experiments.demo.readme", __doc__).parse_args(arguments)
    path = ROOT / "README.md"
    path.write_text(insert(path.read_text(), (ROOT / "docs" / "demo.md").read_text()))


if __name__ == "__main__":
    main()
