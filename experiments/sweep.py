"""Seeds × rules or other settings on one task; what is done already is not done again.

    python -m experiments.sweep NAME [--results FOLDER] [--out FOLDER]      # NAME: a key of SWEEPS, or all

Runs every combination of a sweep from ``SWEEPS`` by the training program, each in its own folder below ``--results``
(default ``results/sweeps``), where an interrupted run goes on; then writes what ``experiments.sweep_report`` needs to
``<out>/<NAME>.json`` (default ``docs/experiments``): per run its fields, its curve and its gradients beside BPTT's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments import train

INTERRUPTED = 130
ROOT = Path(__file__).parents[1]
RESULTS, OUT = Path("results") / "sweeps", Path("docs") / "experiments"
CONTROLS = ("BPTT", "deep e-prop", "hops = 0", "immediate only", "lower frozen")
FEW = ("BPTT", "deep e-prop", "hops = 0", "lower frozen")


MEASURES = {"test accuracy": "test_accuracy", "bits per character": "test_loss"}
"""The figure of a line of metrics that a measure is made of."""


class Sweep(NamedTuple):
    """One task under several rules, or under one rule with several settings.

    Attributes:
      title: for tables and pictures.
      config: file of the training configuration.
      fixed: fields set for all runs.
      grid: fields and their values; every combination is run. ``seed`` and ``compared`` are among them.
      threshold: of the measure, for the number of batches to it.
      measure: what is shown of the test set, a key of ``MEASURES``.
      compared: the field whose values stand side by side: a row of a table and a curve each.
    """

    title: str
    config: str
    fixed: dict[str, Any]
    grid: dict[str, tuple]
    threshold: float = 0.9
    measure: str = "test accuracy"
    compared: str = "rule"

    def runs(self) -> Iterator[dict[str, Any]]:
        """The fields of every run that are not fixed."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def arguments(self, run: dict[str, Any], folder: Path) -> list[str]:
        """The command line of the training program."""
        fields = [f"--config.{name}={value}" for name, value in {**self.fixed, **run}.items()]
        return [f"--config={self.config}", *fields, f"--workdir={folder / slug(run)}"]


SEEDS = (0, 1, 2, 3, 4)
# Detectors whose biases start at zero stay long on a plateau.
XOR_30 = {"xor_count.delay": 30, "xor_count.bias_scale": 0.5, "batches": 800, "checkpoint_every": 400}
XOR_20 = XOR_30 | {
    "xor_count.cues": 3,
    "xor_count.delay": 20,
    "xor_count.distractors": True,
    "learning_rate": 3e-3,
    "batches": 1500,
    "checkpoint_every": 500,
}
# Without from_rest the integrator adds up tanh(b) over the silence, many times what the votes leave.
XOR_300 = XOR_30 | {"xor_count.delay": 300, "xor_count.decay": 0.999, "xor_count.from_rest": True}
SWEEPS: dict[str, Sweep] = {
    "xor_count_30": Sweep(
        "XOR-count, silent delay of 30 steps",
        "configs/xor_count.py",
        XOR_30,
        {"rule": CONTROLS, "seed": SEEDS},
    ),
    "xor_count_30_distractors": Sweep(
        "XOR-count, 30 steps of distractors",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.distractors": True},
        {"rule": CONTROLS, "seed": SEEDS},
    ),
    "xor_count_300": Sweep(
        "XOR-count, silent delay of 300 steps, λ = 0.999",
        "configs/xor_count.py",
        XOR_300,
        {"rule": FEW, "seed": SEEDS[:3]},
    ),
    "xor_count_30_memory": Sweep(
        "XOR-count, silent delay of 30 steps, a detector that remembers",
        "configs/xor_count.py",
        XOR_30,
        {"xor_count.memory": (0.5, 0.9), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "xor_count_30_sgd": Sweep(
        "XOR-count, silent delay of 30 steps, plain gradient descent",
        "configs/xor_count.py",
        XOR_30 | {"optimiser": "sgd", "clip": 1.0, "batches": 1600},
        {"learning_rate": (0.1, 0.3, 1.0), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "relay_ladder": Sweep(
        "XOR-count through dense relays",
        "configs/xor_count.py",
        XOR_20,
        {"xor_count.depth": (2, 3, 4), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "relay_ladder_5": Sweep(
        "XOR-count through three dense relays",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.depth": 5},
        {"rule": FEW, "seed": SEEDS[:3]},
    ),
    "mixing": Sweep(
        "XOR-count, a memory whose units mix",
        "configs/xor_count.py",
        XOR_20,
        {"xor_count.angle": (0.02, 0.1, 0.5), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "mixing_exact": Sweep(
        "XOR-count, a memory whose units mix, by exact RTRL",
        "configs/xor_count.py",
        XOR_20 | {"rule": "exact RTRL"},
        {"xor_count.angle": (0.02, 0.1, 0.5), "seed": SEEDS[:3]},
        compared="xor_count.angle",
    ),
    "mixing_segments": Sweep(
        "XOR-count, a memory whose units mix at angle 0.5, exact within segments",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.angle": 0.5, "rule": "exact in segments"},
        {"segment_length": (2, 8, 16, 29), "seed": SEEDS[:3]},
        compared="segment_length",
    ),
    "motifs": Sweep(
        "Classify three motifs, then count, delay of 12 steps",
        "configs/motifs.py",
        {"evaluate_every": 10},
        {"rule": CONTROLS, "seed": SEEDS},
    ),
    "digits_blank_32": Sweep(
        "Digits by rows, then 32 blank steps",
        "configs/digits.py",
        {"digits.blank": 32},
        {"rule": CONTROLS, "seed": SEEDS},
    ),
    "japanese_vowels": Sweep(
        "Japanese vowels, nine speakers, answer at the last of 25 steps",
        "configs/series.py",
        {},
        {"rule": (*CONTROLS[:1], "exact RTRL", *CONTROLS[1:], "readout only"), "seed": SEEDS},
    ),
    "recall": Sweep(
        "Delayed recall of 140 bits: a loss at 20 steps",
        "configs/recall.py",
        {},
        {"rule": CONTROLS, "seed": SEEDS[:3]},
    ),
    "text": Sweep(
        "The next character of Python's documentation, one to three layers of 16 GRU units",
        "configs/text.py",
        {"text.features": 16, "batches": 1000, "evaluate_every": 100},
        {"text.layers": (1, 2, 3), "rule": CONTROLS, "seed": SEEDS[:3]},
        threshold=3.5,
        measure="bits per character",
    ),
    "text_recall": Sweep(
        "Recall over 32 characters of text: a GRU layer below a linear memory",
        "configs/text_recall.py",
        {"batches": 500, "evaluate_every": 50},
        # In segments deep e-prop has the gradient that it has step by step, faster.
        {"rule": ("BPTT", "e-prop in segments", "hops = 0", "immediate only", "lower frozen"), "seed": SEEDS[:3]},
    ),
    "text_recall_segments": Sweep(
        "Recall over 32 characters of text, exact within segments",
        "configs/text_recall.py",
        {"batches": 500, "evaluate_every": 50, "rule": "exact in segments"},
        {"segment_length": (2, 4, 8), "seed": SEEDS[:3]},
        compared="segment_length",
    ),
    "stale_traces_xor_count": Sweep(
        "XOR-count with a running label, silent delay of 30 steps, updates inside the sequence",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.running": True, "rule": "deep e-prop"},
        {"learning_rate": (1e-3, 1e-2), "update_every": (1, 5, 15, 45), "seed": SEEDS[:3]},
        compared="update_every",
    ),
    "stale_traces_text": Sweep(
        "The next character, one layer of 16 GRU units, updates inside the 32 steps of a batch",
        "configs/text.py",
        {"text.features": 16, "text.layers": 1, "batches": 1000, "evaluate_every": 100, "rule": "deep e-prop"},
        {"learning_rate": (1e-3, 1e-2), "update_every": (1, 4, 32), "seed": SEEDS[:3]},
        threshold=3.5,
        measure="bits per character",
        compared="update_every",
    ),
    "evidence": Sweep(
        "Evidence accumulation by adaptive spiking neurons",
        "configs/evidence.py",
        {"batches": 150, "evaluate_every": 25, "checkpoint_every": 150},
        # In segments deep e-prop has the gradient that it has step by step, much faster.
        {
            "evidence.cells": ("ALIF", "ALIF, tanh"),
            "rule": ("BPTT", "e-prop in segments", "immediate only", "lower frozen"),
            "seed": SEEDS[:3],
        },
    ),
}


def slug(run: dict[str, Any]) -> str:
    """A folder's name for a run."""
    words = [f"{name.split('.')[-1]}={value}" for name, value in run.items()]
    return ",".join(words).replace(" ", "")


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
        "threshold": sweep.threshold,
        "measure": sweep.measure,
        "compared": sweep.compared,
        "runs": runs,
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
