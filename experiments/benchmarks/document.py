"""Put the stored figures into docs/logs/performance/, between their markers.

    python -m experiments.benchmarks.document

Reads docs/benchmarks/<suite>.json, which ``python -m experiments.benchmarks --suite <suite> --out docs/benchmarks``
writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.benchmarks.report import markdown
from experiments.program import pages
from experiments.program.command import Parser

PAGE = pages.Log(pages.DOCS, "performance")
KIND = "benchmark"


def fill(page: str, folder: Path) -> str:
    """The page with every suite's tables between its markers, and its picture where there is one.

    A stored suite without a section gets one, at the end of README.md.

    Raises:
      Refused: half of a section.
    """
    for name in sorted({path.stem for path in folder.glob("*.json")} - set(pages.names(page, KIND))):
        title = json.loads((folder / f"{name}.json").read_text())["title"]
        page = pages.add(page, f"{KIND} {name}", title, "python -m experiments.benchmarks.document")
    for name in pages.names(page, KIND):
        page = pages.fill(page, f"{KIND} {name}", _section(name, folder))
    return page


def _section(name: str, folder: Path) -> str:
    path = folder / f"{name}.json"
    if not path.exists():
        return f"No figures are stored: `python -m experiments.benchmarks --suite {name} --out docs/benchmarks`."
    suite = json.loads(path.read_text())
    picture = f"\n\n![{suite['title']}](../../benchmarks/{name}.png)" if path.with_suffix(".png").exists() else ""
    return markdown(suite) + picture


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    Parser("experiments.benchmarks.document", __doc__).parse_args(arguments)
    PAGE.write_text(fill(PAGE.read_text(), PAGE.parent / "benchmarks"))


if __name__ == "__main__":
    main()
