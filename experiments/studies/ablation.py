"""Where does a trained network keep what it recalls? One layer's carry is set to zero before one step.

    python -m experiments.sweeps text_recall_grid && python -m experiments.sweeps text_recall_segments
    python -m experiments.studies.ablation [--results FOLDER]   # from their checkpoints: docs/ablation/text_recall.json
    python -m experiments.studies.ablation --report             # its table in docs/logs/experiments

The networks of recall in text: a GRU layer below a linear memory. If answers survive the loss of a layer's carry, what
they need is kept elsewhere at that time.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.commit import commit
from experiments.sweeps import SWEEPS, sweep
from experiments.sweeps.grid import slug
from experiments.tasks.catalogue import Task
from experiments.training.train import trained

PyTree = Any
PAGE = pages.EXPERIMENTS
COMMAND = "python -m experiments.studies.ablation"
STORED = PAGE.parent / "ablation" / "text_recall.json"
LAYERS = {"GRU": 0, "memory": 1}
STEPS = (3, 10, 20, 32, 36)
"""Of 37: the value is read at step 2, 32 characters of text come at steps 3 to 34, the question at 35 and 36."""
SEEDS = (0, 1, 2)


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A rule, the sweep that trained by it, and the run's fields."""
    for seed in SEEDS:
        for rule in ("BPTT", "deep e-prop"):
            fields = {"text_recall.gap": 32, "text_recall.pairs": 1, "rule": rule, "seed": seed}
            yield rule, "text_recall_grid", fields
        yield "exact in segments of 32", "text_recall_segments", {"segment_length": 32, "seed": seed}


def accuracy(task: Task, params: PyTree, layer: int | None = None, step: int = 0) -> float:
    """Of the answers at the last step of the test set; the carry of ``layer`` is zero before ``step``."""
    xs, targets = task.test()
    carry = task.network.init(jax.random.key(0), xs[0])[1]

    def at(carry: PyTree, now: tuple[jax.Array, jax.Array]) -> tuple[PyTree, PyTree]:
        t, x = now
        if layer is not None:
            kept = jax.tree.map(lambda leaf: jnp.where(t == step, 0, leaf), carry[layer])
            carry = (*carry[:layer], kept, *carry[layer + 1 :])
        return task.network.apply(params, carry, x)

    _, outputs = jax.lax.scan(at, carry, (jnp.arange(len(xs)), xs))
    return float(jnp.mean(task.right(outputs[-1:], targets.label[-1:])))


def measure(results: Path) -> dict[str, Any]:
    """All cases, from the sweeps' folders."""
    runs, now = [], commit()
    for rule, name, fields in track(list(cases()), "networks"):
        setting, params = trained(results / name / slug(fields))
        task = setting.task
        zeroed = {word: [accuracy(task, params, layer, step) for step in STEPS] for word, layer in LAYERS.items()}
        runs.append({"rule": rule, "seed": fields["seed"], "whole": accuracy(task, params), "zeroed": zeroed})
    return {"command": COMMAND, "commit": now, "steps": STEPS, "runs": runs}


def markdown(result: dict[str, Any]) -> str:
    """The table: means over seeds."""
    rules = dict.fromkeys(run["rule"] for run in result["runs"])
    heads = ["rule", "set to zero", *(f"before step {step}" for step in result["steps"]), "never"]
    rows = []
    for rule in rules:
        runs = [run for run in result["runs"] if run["rule"] == rule]
        whole = f"{statistics.mean(run['whole'] for run in runs):.2f}"
        for layer in runs[0]["zeroed"]:
            means = [statistics.mean(values) for values in zip(*(run["zeroed"][layer] for run in runs), strict=True)]
            rows.append([rule, layer, *(f"{mean:.2f}" for mean in means), whole])
    words = f"`{COMMAND}`, commit {result['commit']}; test accuracy, mean over seeds."
    return f"{words}\n\n{pages.table(heads, rows, words=2)}"


def fill(page: str, result: dict[str, Any]) -> str:
    """The page with the table between its markers."""
    return pages.fill(page, "ablation", markdown(result))


def main(arguments: list[str] | None = None) -> int:
    """The measurement, or its report; returns the exit status."""
    parser = Parser("experiments.studies.ablation", __doc__)
    parser.add_argument("--results", type=Path, default=sweep.RESULTS, help="folder of the sweeps' runs")
    parser.add_argument("--report", action="store_true", help="write the page's table from the stored result")
    options = parser.parse_args(arguments)
    if not options.report:
        complete = {name: len(sweep.collect(SWEEPS[name], options.results / name)) for _, name, _ in cases()}
        missing = [name for name, runs in complete.items() if runs < len(list(SWEEPS[name].runs()))]
        if missing:
            commands = " && ".join(f"python -m experiments.sweeps {name}" for name in missing)
            print(
                f"error: {options.results} lacks runs of {', '.join(missing)}. Run first: {commands}", file=sys.stderr
            )
            return 2
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(measure(options.results), indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), json.loads(STORED.read_text())))
    return 0


if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
