"""Online reinforcement learning: every rule on one task, five seeds at once; what is done is not done again.

    python -m experiments.rl [TASK] [--rule RULE] [--results FOLDER] [--out FOLDER]

TASK is one of those of ``configs/rl.py``, or all (which leaves out gymnax's where gymnax is not installed). Each rule's
curves go to ``<results>/<TASK>/<rule>.json`` (default ``results/rl``) once it is done, and with those of the rules that
were done before to ``<out>/<TASK>.json`` (default ``docs/rl``), for ``python -m experiments.rl.report``. A rule that
was stopped starts anew; one that was run with other numbers is run again. What ``<out>`` has of other rules stays.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import ml_collections
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from configs.rl import get_config
from experiments.program.command import Parser, one_of
from experiments.program.commit import commit
from experiments.program.refusal import Refused
from experiments.rl.training import make_environment, records

COMMAND = "python -m experiments.rl"
RESULTS, OUT = Path("results") / "rl", Path("docs") / "rl"


def settings_of(config: ml_collections.ConfigDict, task: str) -> dict[str, Any]:
    """All that a result depends on, as JSON has it."""
    fields = {name: value for name, value in config.to_dict().items() if name not in ("tasks", "rules", "threshold")}
    return json.loads(json.dumps({**fields, "task": config.tasks[task].to_dict()}))


def path_of(folder: Path, task: str, rule: str) -> Path:
    """Where a rule's curves are stored."""
    return folder / task / f"{re.sub(r'[^a-z0-9]+', '_', rule.lower()).strip('_')}.json"


def stored(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A rule's curves, if they are there and of these settings."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return result if result["settings"] == settings else None


def train(config: ml_collections.ConfigDict, name: str, rule: str, progress: Progress) -> dict[str, Any]:
    """A rule's curves, as they are stored."""
    task, start = config.tasks[name], time.perf_counter()
    bar = progress.add_task(f"{task.title}: {rule}", total=task.steps, note="compiling")
    step, returned, episodes, entropy = [], [], [], []
    for record in records(config, task, rule):
        step.append(record.step)
        returned.append([None if math.isnan(value) else round(float(value), 4) for value in record.returned])
        episodes.append(record.episodes.tolist())
        entropy.append([round(float(value), 4) for value in record.entropy])
        shown = " ".join("-" if value is None else f"{value:.2f}" for value in returned[-1])
        progress.update(bar, completed=record.step, note=f"return {shown}")
    return {
        "rule": rule,
        "settings": settings_of(config, name),
        "commit": commit(),
        "seconds": round(time.perf_counter() - start, 1),
        "step": step,
        "return": returned,
        "episodes": episodes,
        "entropy": entropy,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n")
    part.replace(path)


def collect(config: ml_collections.ConfigDict, name: str, results: Path, out: Path) -> dict[str, Any] | None:
    """The curves of the rules of a task that are done, and the names of the others; None where none is.

    What is in ``out`` already, with the same numbers, stays there: a fresh clone has ``out`` and no ``results``.
    """
    settings = settings_of(config, name)
    before = stored(out / f"{name}.json", settings) or {"runs": []}
    kept = {one["rule"]: one for one in before["runs"]}
    found = {rule: stored(path_of(results, name, rule), settings) or kept.get(rule) for rule in config.rules}
    runs = [one for one in found.values() if one is not None]
    if not runs:
        return None
    environment = make_environment(config.tasks[name])
    return {
        "title": config.tasks[name].title,
        "command": f"{COMMAND} {name}",
        "commit": ", ".join(sorted({one["commit"] for one in runs})),
        "best": environment.best,
        "threshold": config.threshold,
        "settings": settings,
        "missing": [rule for rule in config.rules if found[rule] is None],
        "runs": [{key: one[key] for key in one if key != "settings"} for one in runs],
    }


def run(config: ml_collections.ConfigDict, name: str, rules: list[str], results: Path, out: Path) -> None:
    """Train what is missing of a task, and store what is whole.

    Raises:
      Refused: an environment of gymnax, which is not installed.
    """
    make_environment(config.tasks[name])
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}")) as progress:
        for rule in rules:
            path = path_of(results, name, rule)
            if stored(path, settings_of(config, name)) is None:
                write(path, train(config, name, rule, progress))
            else:
                progress.console.print(f"{config.tasks[name].title}: {rule} is done.")
            result = collect(config, name, results, out)
            if result is not None:
                write(out / f"{name}.json", result)


def main(arguments: list[str] | None = None, config: ml_collections.ConfigDict | None = None) -> int:
    """Run one task or all; returns the exit status: 130 after Ctrl-C, 2 for what cannot be run."""
    config = config or get_config()
    tasks = list(config.tasks)
    parser = Parser("experiments.rl", __doc__)
    parser.epilog = f"TASK is one of: all, {', '.join(tasks)}."
    parser.add_argument("task", metavar="TASK", nargs="?", default="all", type=one_of("task", ["all", *tasks]))
    parser.add_argument("--rule", action="append", type=one_of("rule", config.rules), help="only this one; repeat it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of each rule's curves")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of <TASK>.json")
    options = parser.parse_args(arguments)
    console = Console()
    for name in tasks if options.task == "all" else [options.task]:
        try:
            run(config, name, options.rule or list(config.rules), options.results, options.out)
        except Refused as error:
            if options.task != "all":
                print(f"error: {error}", file=sys.stderr)
                return 2
            console.print(f"{name} left out: {error}")
        except KeyboardInterrupt:
            console.print("Interrupted: the same command goes on with the rule that was stopped.")
            return 130
    return 0
