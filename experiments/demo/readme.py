"""Put the measured tables into README.md, between their markers.

    python -m experiments.demo.readme

Reads docs/demo.md, which ``python -m experiments.demo --out docs`` writes.
"""

from __future__ import annotations

from experiments.program import pages
from experiments.program.command import Parser

ROOT = pages.DOCS.parent


def insert(readme: str, tables: str) -> str:
    """The README with ``tables`` between its markers.

    Raises:
      Refused: the markers are missing.
    """
    return pages.fill(readme, "demo.md", tables)


def main(arguments: list[str] | None = None) -> None:
    """Write README.md."""
    Parser("experiments.demo.readme", __doc__).parse_args(arguments)
    path = ROOT / "README.md"
    path.write_text(insert(path.read_text(), (ROOT / "docs" / "demo.md").read_text()))


if __name__ == "__main__":
    main()
