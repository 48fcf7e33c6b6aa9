"""Text in columns."""

from __future__ import annotations

from collections.abc import Container, Sequence


def table(rows: Sequence[Sequence[object]], left: Container[int] = (0,), indent: str = "") -> list[str]:
    """One line per row, the first of which are the heads; columns in ``left`` are flush left, numbers flush right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append((indent + "  ".join(padded)).rstrip())
    return lines
