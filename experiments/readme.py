"""Put the measured tables into README.md, between their markers.

    python -m experiments.readme

Reads docs/demo.md, which ``python -m experiments.demo --out docs`` writes.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"(<!-- demo\.md: [^\n]*-->\n).*?(\n<!-- end of demo\.md -->)", re.DOTALL)


def insert(readme: str, tables: str) -> str:
    """The README with ``tables`` between its markers.

    Raises:
      ValueError: the markers are missing.
    """
    if not SECTION.search(readme):
        raise ValueError("README.md has no section between '<!-- demo.md: ... -->' and '<!-- end of demo.md -->'.")
    return SECTION.sub(lambda found: found[1] + tables.strip() + found[2], readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(insert(path.read_text(), (ROOT / "docs" / "demo.md").read_text()))
