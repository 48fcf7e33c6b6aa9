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
SOURCES = ("deepeprop_jax", "experiments", "configs")
COMMITS = "commits"
RESULTS, OUT = Path("results") / "sweeps", Path("docs") / "experiments"


def metrics(path: Path) -> list[dict[str, Any]] | None:
    """A run's lines; None for a run that is not there or not complete."""
    config, lines = path / "config.json", path / "metrics.jsonl"
    if not config.exists() or not lines.exists():
        return None
    whole = [json.loads(line) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
    complete = whole and whole[-1]["batch"] == json.loads(config.read_text())["batches"]
    return whole if complete else None


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


def commit() -> str:
    """Of the repository, and whether the sources have been changed since; empty without git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *SOURCES], capture_output=True, cwd=ROOT)
    except OSError:
        return ""
    return head.stdout.strip() + ("-dirty" if head.returncode == 0 and changes.returncode else "")


def trained_at(path: Path, now: str) -> None:
    """Keep a commit beside a run that it is about to begin or to go on with."""
    kept = commits(path)
    if now not in kept:
        path.mkdir(parents=True, exist_ok=True)
        (path / COMMITS).write_text("".join(f"{one}\n" for one in [*kept, now]))


def commits(path: Path) -> list[str]:
    """At which a run was trained: one, or several where it was interrupted."""
    return (path / COMMITS).read_text().split() if (path / COMMITS).exists() else []


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*sorted(SWEEPS), "all"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    refused, now = 0, commit()
    for name in SWEEPS if options.name == "all" else [options.name]:
        sweep, folder = SWEEPS[name], options.results / name
        runs = list(sweep.runs())
        for number, run in enumerate(runs, 1):
            print(f"{name}, run {number} of {len(runs)}: {slug(run)}", flush=True)
            if metrics(folder / slug(run)) is None:
                trained_at(folder / slug(run), now)
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
        "command": f"python -m experiments.sweep {name}",
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


if __name__ == "__main__":
    sys.exit(main())
