"""Pages with parts that programs write: each between two markers, so that text by hand can stand around them.

<!-- TITLE: whatever should be said of it -->
what the program writes
<!-- end of TITLE -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from experiments.program.refusal import Refused

DOCS = Path(__file__).parents[2] / "docs"
EXPERIMENTS = DOCS / "experiments.md"
"""The page of the sweeps and the studies; their stored results lie beside it."""


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """A table in Markdown; its first columns, so many as ``words``, are set to the left, all others to the right."""
    heads = list(heads)
    rule = "|---" * words + "|---:" * (len(heads) - words) + "|"
    return "\n".join([_row(heads), rule, *map(_row, rows)])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _section(title: str) -> re.Pattern:
    return re.compile(rf"^(<!-- {title}: [^\n]*-->\n)(.*?)^(<!-- end of {title} -->)$", re.DOTALL | re.MULTILINE)


def _seen(page: str, title: str) -> list[str]:
    """The lines that look like markers of a section, right or not."""
    return [line for line in page.splitlines() if re.match(rf"\s*<!--\s*(end of )?{re.escape(title)}(?=[:\s])", line)]


def _missing(page: str, title: str) -> Refused:
    return Refused(
        f"The page has no section {title!r}; seen of its markers: {_seen(page, title) or 'none'}. The page must hold "
        f"these two lines, once and in this order:\n<!-- {title}: note -->\n<!-- end of {title} -->"
    )


def names(page: str, kind: str) -> list[str]:
    """NAME of every section whose title is "KIND NAME", in the page's order."""
    return re.findall(rf"^<!-- {re.escape(kind)} ([^\s:]+): [^\n]*-->$", page, re.MULTILINE)


def fill(page: str, title: str, body: str) -> str:
    """The page with ``body`` as the section of that title; all else stays as it is.

    Raises:
      Refused: there is no such section; with what is seen of it, and the lines that make it.
    """
    section = _section(re.escape(title))
    if not section.search(page):
        raise _missing(page, title)
    return section.sub(lambda found: f"{found[1]}{body.strip()}\n{found[3]}", page)


def add(page: str, title: str, heading: str, command: str) -> str:
    """The page with an empty section more, at its end.

    Raises:
      Refused: the page has a part of the section's markers.
    """
    if _seen(page, title):
        raise _missing(page, title)
    markers = f"<!-- {title}: written by `{command}` -->\n<!-- end of {title} -->"
    return f"{page.rstrip()}\n\n## {heading}\n\n{markers}\n"
