"""Seeds × rules or other settings on one task; what is done already is not done again.

    python -m experiments.sweep NAME [--results FOLDER] [--out FOLDER]      # NAME: a key of SWEEPS, or all

Runs every combination of a sweep from ``SWEEPS`` by the training program, each in its own folder below ``--results``
(default ``results/sweeps``), where an interrupted run goes on; then writes what ``experiments.sweep_report`` needs to
``<out>/<NAME>.json`` (default ``docs/experiments``): per run its fields, its curve and its gradients beside BPTT's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments import train
from experiments.grid import MEASURES, Sweep, slug
from experiments.sweeps import SWEEPS

INTERRUPTED = 130
ROOT = Path(__file__).parents[1]
RESULTS, OUT = Path("results") / "sweeps", Path("docs") / "experiments"


def collect(sweep: Sweep, folder: Path) -> list[dict[str, Any]]:
    """What is known of all runs that are complete."""
    found = []
    for run in sweep.runs():
        path = folder / slug(run)
        config = path / "config.json"
        lines = path / "metrics.jsonl"
        if not config.exists() or not lines.exists():
            continue
        metrics = [json.loads(line) for line in lines.read_text().splitlines()]
        if not metrics or metrics[-1]["batch"] != json.loads(config.read_text())["batches"]:
            continue
        found.append(
            {
                "fields": run,
                "batch": [line["batch"] for line in metrics],
                MEASURES[sweep.measure]: [line[MEASURES[sweep.measure]] for line in metrics],
                "layers": {str(line["batch"]): line["layers"] for line in metrics if "layers" in line},
            }
        )
    return found


def commit() -> str:
    """Of the repository, and whether it has been changed since; empty without git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=ROOT
        )
    except OSError:
        return ""
    return run.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*sorted(SWEEPS), "all"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    refused = 0
    for name in SWEEPS if options.name == "all" else [options.name]:
        sweep, folder = SWEEPS[name], options.results / name
        runs = list(sweep.runs())
        for number, run in enumerate(runs, 1):
            print(f"{name}, run {number} of {len(runs)}: {slug(run)}", flush=True)
            status = train.main(sweep.arguments(run, folder))
            if status == INTERRUPTED:
                return status
            if status:
                # Data that are not there, say: the other sweeps go on.
                refused = status
                break
        else:
            store(name, sweep, collect(sweep, folder), options.out)
    return refused


def store(name: str, sweep: Sweep, runs: list[dict[str, Any]], out: Path) -> None:
    """Write the sweep's results."""
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "title": sweep.title,
        "command": f"python -m experiments.sweep {name}",
        "commit": commit(),
        "config": sweep.config,
        "fixed": sweep.fixed,
        "by_rule": dict(sweep.by_rule),
        "threshold": sweep.threshold,
        "measure": sweep.measure,
        "compared": sweep.compared,
        "runs": runs,
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
