"""Pages with parts that programs write: each between two markers, so that text by hand can stand around them.

<!-- TITLE: whatever should be said of it -->
what the program writes
<!-- end of TITLE -->

A page may be a log: several files that are read and written as one text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from experiments.program.refusal import Refused

DOCS = Path(__file__).parents[2] / "docs"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """A table in Markdown; its first columns, so many as ``words``, are set to the left, all others to the right."""
    heads = list(heads)
    rule = "|---" * words + "|---:" * (len(heads) - words) + "|"
    return "\n".join([_row(heads), rule, *map(_row, rows)])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


FILE = re.compile(r"^<!-- file (\S+) -->\n", re.MULTILINE)
"""Ahead of each file's text in that of a log."""


class Log(NamedTuple):
    """All Markdown files of docs/logs/NAME as one page, read and written as a Path is; README.md is the last.

    Attributes:
      parent: docs, where the stored results and pictures lie in folders of their own.
      name: of the log.
    """

    parent: Path
    name: str

    def __str__(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.parent / "logs" / self.name

    def files(self) -> list[Path]:
        """By name; README.md last, so that what is added at the end of the page lands there."""
        return sorted(self.folder.glob("*.md"), key=lambda path: (path.name == "README.md", path.name))

    def read_text(self) -> str:
        """The texts of all files, a line with its name ahead of each."""
        return "".join(f"<!-- file {path.name} -->\n{path.read_text()}" for path in self.files())

    def write_text(self, text: str) -> None:
        """Each file with its part of the text, as ``read_text`` puts them together."""
        parts = FILE.split(text)[1:]
        for name, part in zip(parts[::2], parts[1::2], strict=True):
            (self.folder / name).write_text(part)


EXPERIMENTS = Log(DOCS, "experiments")
"""The log of the sweeps and the studies; their stored results lie in folders of ``docs``."""


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
