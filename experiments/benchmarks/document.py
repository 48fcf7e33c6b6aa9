"""Put the stored figures into docs/performance.md, between their markers.

    python -m experiments.benchmarks.document

Reads docs/benchmarks/<suite>.json, which ``python -m experiments.benchmarks --suite <suite> --out docs/benchmarks``
writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from experiments.benchmarks.report import markdown

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
SECTION = re.compile(r"(<!-- benchmark (\w+): [^\n]*-->\n).*?(\n<!-- end of benchmark \2 -->)", re.DOTALL)


def fill(page: str, folder: Path) -> str:
    """The page with every suite's tables between its markers, and its picture where there is one.

    Raises:
      ValueError: no markers, or a stored suite without a section.
    """
    sections = {found[2] for found in SECTION.finditer(page)}
    stored = {path.stem for path in folder.glob("*.json")}
    if not sections or stored - sections:
        raise ValueError(
            "the page needs '<!-- benchmark NAME: ... -->' and '<!-- end of benchmark NAME -->' for each of "
            f"{sorted(stored)}; seen {sorted(sections)}."
        )
    return SECTION.sub(lambda found: found[1] + _section(found[2], folder) + found[3], page)


def _section(name: str, folder: Path) -> str:
    path = folder / f"{name}.json"
    if not path.exists():
        return f"No figures are stored: `python -m experiments.benchmarks --suite {name} --out docs/benchmarks`."
    suite = json.loads(path.read_text())
    picture = f"\n\n![{suite['title']}](benchmarks/{name}.png)" if path.with_suffix(".png").exists() else ""
    return markdown(suite) + picture


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), PAGE.parent / "benchmarks"))
