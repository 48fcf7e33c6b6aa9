"""Seeds × rules or other settings on one task; what is done already is not done again.

    python -m experiments.sweeps NAME [--results FOLDER] [--out FOLDER]      # NAME: a key of SWEEPS, or all

Runs every combination of a sweep from ``SWEEPS`` by the training program, each in its own folder below ``--results``
(default ``results/sweeps``), where an interrupted run goes on; then writes what ``experiments.sweeps.report`` needs to
``<out>/<NAME>.json`` (default ``docs/experiments``): per run its fields, its curve and its gradients beside BPTT's.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from experiments.program.command import Parser, one_of
from experiments.sweeps import SWEEPS
from experiments.sweeps.grid import COMMAND, MEASURES, Sweep, slug
from experiments.training import train
from experiments.training.workdir import commits, whole_lines

INTERRUPTED = 130
RESULTS, OUT = Path("results") / "sweeps", Path("docs") / "experiments"


def metrics(path: Path) -> list[dict[str, Any]] | None:
    """A run's lines; None for a run that is not there or not complete."""
    config, lines = path / "config.json", whole_lines(path / "metrics.jsonl")
    complete = config.exists() and lines and lines[-1]["batch"] == json.loads(config.read_text())["batches"]
    return lines if complete else None


def collect(sweep: Sweep, folder: Path) -> list[dict[str, Any]]:
    """What is known of all runs that are complete."""
    found = []
    for run in sweep.runs():
        lines = metrics(folder / slug(run))
        if lines is None:
            continue
        found.append(
            {
                "fields": run,
                "batch": [line["batch"] for line in lines],
                MEASURES[sweep.measure]: [line[MEASURES[sweep.measure]] for line in lines],
                "layers": {str(line["batch"]): line["layers"] for line in lines if "layers" in line},
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep; returns the exit status."""
    parser = Parser("experiments.sweeps", __doc__)
    parser.epilog = textwrap.fill(f"NAME is one of: all, {', '.join(SWEEPS)}.", width=100)
    parser.add_argument("name", metavar="NAME", type=one_of("sweep", ["all", *SWEEPS]), help="see below")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of <NAME>.json")
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
            store(name, sweep, folder, options.out)
    return refused


def store(name: str, sweep: Sweep, folder: Path, out: Path) -> None:
    """Write the sweep's results, and the commits that its runs were trained at."""
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "title": sweep.title,
        "command": f"{COMMAND} {name}",
        "commit": ", ".join(sorted({one for run in sweep.runs() for one in commits(folder / slug(run))})),
        "config": sweep.config,
        "fixed": sweep.fixed,
        "by_rule": dict(sweep.by_rule),
        "threshold": sweep.threshold,
        "measure": sweep.measure,
        "compared": sweep.compared,
        "runs": collect(sweep, folder),
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
