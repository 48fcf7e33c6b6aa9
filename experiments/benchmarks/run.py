"""Run suites, with a progress bar, and store what they found as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.benchmarks.figures import draw
from experiments.benchmarks.machine import measure
from experiments.benchmarks.measure import calls_of, compare
from experiments.benchmarks.report import machine_line, markdown, rich_tables
from experiments.benchmarks.suites import Suite


def run_suites(suites: dict[str, Suite], rounds: int, out: Path) -> int:
    """One after the other; writes ``<suite>.json``, ``.md`` and ``.png``; the exit status (130 after Ctrl-C)."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    for name, suite in suites.items():
        with jax.default_matmul_precision("highest"):
            machine = measure(rounds)
        found: dict[str, Any] = {
            "suite": name,
            "title": suite.title,
            "picture": suite.picture,
            "against": list(suite.against),
            "rounds": rounds,
            "interrupted": False,
            "machine": machine,
            "comparisons": [],
        }
        console.print(f"\n[bold]{suite.title}[/bold]\n{machine_line(found['machine'])}")
        try:
            # Gradient errors need one arithmetic; a GPU would round the factors of float32 products to fewer bits.
            with jax.default_matmul_precision("highest"):
                _run_suite(suite, rounds, found, out / name, console)
        except KeyboardInterrupt:
            found["interrupted"] = True
            console.print("[bold]Interrupted: the tables show what was known by then.[/bold]")
        store(found, out / name)
        for table in rich_tables(found):
            console.print(table)
        if found["interrupted"]:
            return 130
    return 0


def _run_suite(suite: Suite, rounds: int, found: dict[str, Any], path: Path, console: Console) -> None:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        total = sum(calls_of(comparison, rounds) for comparison in suite.comparisons)
        bar = progress.add_task("", total=total)
        for comparison in suite.comparisons:
            record: dict[str, Any] = {}
            found["comparisons"].append(record)

            def advance(what: str, problem: Any = comparison.problem) -> None:
                progress.update(bar, advance=1, description=f"{problem}: {what}")

            compare(comparison, rounds, record, advance)
            # Programs of earlier comparisons only take memory.
            jax.clear_caches()
            store(found, path)


def store(found: dict[str, Any], path: Path) -> None:
    """JSON, Markdown and picture of what is known so far."""
    found["comparisons"] = [record for record in found["comparisons"] if record.get("rivals")]
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found) + "\n")
    draw(found, path.with_suffix(".png"))
