"""Does the cosine of a gradient foretell what it learns? From the stored results of all sweeps.

    python -m experiments.studies.cosine

A case is a rule at a setting of a sweep that has BPTT and the control with a frozen lowest layer. Its cosine and norm
ratio are those of the lowest layer's first gradient, against BPTT's, medians over seeds: what is known before training.
Where there is no gradient (less than 10⁻⁴ of BPTT's norm) there is no cosine.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from experiments.program import pages
from experiments.program.command import Parser
from experiments.program.pictures import COLOURS, open_axes, pyplot, save
from experiments.sweeps.results import FOLDER, NOTHING, gap_closed, groups, stored

PAGE = pages.EXPERIMENTS
WITHOUT_A_GRADIENT_BELOW = ("lower frozen", "readout only")
THE_REFERENCE = ("BPTT", "exact RTRL")
COSINES = (0.0, 0.3, 0.7, 0.95, 1.0)
"""Ends of the table's rows; a case below 0 is in the first."""
FAINT = 0.3
"""Of the norm ratio."""


class Case(NamedTuple):
    """A rule at work on a task: its first gradient of the lowest layer, and the gap closed in the end."""

    rule: str
    cosine: float | None
    norm_ratio: float
    gap_closed: float


def cases(results: Iterable[dict[str, Any]]) -> list[Case]:
    """Of all sweeps by rules, each once; without those where BPTT is no better than the frozen control."""
    found = []
    for result in results:
        if result.get("compared", "rule") != "rule":
            continue
        for rules in groups(result["runs"]).values():
            for rule, runs in rules.items():
                gap = gap_closed(runs, rules)
                if gap is None or rule in WITHOUT_A_GRADIENT_BELOW + THE_REFERENCE:
                    continue
                lowest = [run["layers"]["0"][0] for run in runs]
                ratio = statistics.median(one["norm_ratio"] for one in lowest)
                cosine = None if ratio < NOTHING else round(statistics.median(one["cosine"] for one in lowest), 6)
                found.append(Case(rule, cosine, ratio, gap))
    return list(dict.fromkeys(found))


def row(title: str, chosen: list[Case]) -> list[str]:
    """Number of cases, and of the gap closed the lowest, median and highest."""
    gaps = [case.gap_closed for case in chosen]
    figures = [min(gaps), statistics.median(gaps), max(gaps)] if gaps else []
    shown = [f"{round(gap, 2) + 0.0:.2f}" for gap in figures] or ["–"] * 3
    return [title, str(len(chosen)), *shown]


def markdown(found: list[Case]) -> str:
    """The table, and the rank correlations."""
    pointing = [case for case in found if case.cosine is not None]
    without = [case for case in found if case.cosine is None]
    rows = [row("no gradient", without)] if without else []
    for low, high in itertools.pairwise(COSINES):
        # The first band has what is below 0 too, the last one what is 1.
        band = [case for case in pointing if low <= max(case.cosine, 0) < high or case.cosine >= high == 1]
        rows.append(row(f"{low:.2f} to {high:.2f}", band))
        for words, faint in ((f"norm ratio below {FAINT}", True), (f"norm ratio {FAINT} or more", False)):
            part = [case for case in band if (case.norm_ratio < FAINT) == faint]
            if 0 < len(part) < len(band):
                rows.append(row(f"… {words}", part))
    gaps = [case.gap_closed for case in pointing]
    cosine, ratio = (
        spearmanr([getattr(case, name) for case in pointing], gaps).statistic for name in ("cosine", "norm_ratio")
    )
    words = (
        f"`python -m experiments.studies.cosine`: {len(found)} cases. Spearman's rank correlation with the gap closed: "
        f"of the cosine {cosine:.2f}, of the norm ratio {ratio:.2f}."
    )
    heads = ["cosine of the lowest layer's first gradient", "cases", "gap closed: lowest", "median", "highest"]
    return f"{words}\n\n{pages.table(heads, rows)}"


def draw(found: list[Case], path: Path) -> None:
    """Gap closed against cosine; the area of a point is its norm ratio."""
    figure, axis = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    for rule in dict.fromkeys(case.rule for case in found):
        chosen = [case for case in found if case.rule == rule and case.cosine is not None]
        cosines, gaps = [case.cosine for case in chosen], [max(case.gap_closed, -0.2) for case in chosen]
        areas = [10 + 80 * min(case.norm_ratio, 1.5) for case in chosen]
        axis.scatter(cosines, gaps, s=areas, color=COLOURS.get(rule), label=rule, alpha=0.6, linewidths=0)
    axis.set_xlabel("cosine to BPTT, lowest layer, before training; area: norm ratio")
    axis.set_ylabel("gap closed (-0.2: that or less)")
    open_axes(axis)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def fill(page: str, found: list[Case]) -> str:
    """The page with the table between its markers."""
    picture = "![Gap closed against the cosine of the first gradient](../../experiments/cosine.png)"
    return pages.fill(page, "cosine", f"{markdown(found)}\n\n{picture}")


def main(arguments: list[str] | None = None) -> None:
    """Write the section and its picture."""
    Parser("experiments.studies.cosine", __doc__).parse_args(arguments)
    found = cases(stored())
    draw(found, FOLDER / "cosine.png")
    PAGE.write_text(fill(PAGE.read_text(), found))
    print(f"{PAGE}: {len(found)} cases")


if __name__ == "__main__":
    main()
