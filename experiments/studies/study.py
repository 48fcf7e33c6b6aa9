"""A study as a program: measure and store, then write picture and page; or write them from what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.program import pages
from experiments.program.command import Parser
from experiments.program.commit import commit

PAGE = pages.EXPERIMENTS


def run_study(
    arguments: list[str] | None,
    parser: Parser,
    stored: str,
    measured: Callable[[], dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], None],
    fill: Callable[[str, dict[str, Any]], str],
) -> int:
    """A program that measures and stores, or reports what is stored; returns the exit status."""
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="folder for the figures and the picture")
    parser.add_argument("--report", action="store_true", help="from the stored figures")
    options = parser.parse_args(arguments)
    path = options.out / stored
    if not options.report:
        now = commit()
        result = {**measured(), "commit": now}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    elif not path.exists():
        parser.error(f"{path} does not exist, so there is nothing to report. Measure first: leave out --report.")
    result = json.loads(path.read_text())
    draw(result, path.with_suffix(".png"))
    if options.out == PAGE.parent:
        PAGE.write_text(fill(PAGE.read_text(), result))
    return 0
