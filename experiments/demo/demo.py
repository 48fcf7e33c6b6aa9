"""The demo: learning rules side by side on the same seeds, online on real digits, and on a task made of credit alone.

    python -m experiments.demo [--out results]

Trains with a progress bar, prints one table for each task, and writes ``demo.md`` and ``demo.png`` to the output
folder. Ctrl-C stops the training and prints the tables as far as they are known.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import ml_collections
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from configs.demo import get_config
from experiments.demo.report import Result, draw_curves, markdown_table, rich_table
from experiments.demo.several_seeds import Start, Trainer, make_measured, make_start
from experiments.program.command import Parser
from experiments.tasks.catalogue import TASKS, Task

TASK_OPTIONS = {
    "digits": ("features", "blank", "batch"),
    "xor_count": ("features", "width", "cues", "gap", "delay", "decay", "batch", "test_size", "bias_scale"),
}


class Demo:
    """All tasks × rules: trained by a few threads, and known as far as they have come."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        titles = {
            f"digits by rows, then {config.digits.blank} blank steps": "digits",
            f"XOR-count, delay {config.xor_count.delay}": "xor_count",
        }
        self.threshold = config.threshold
        self.results = {title: {rule: Result() for rule in config.rules} for title in titles}
        self._config, self._titles = config, titles
        self._trainers: dict[tuple[str, str], Trainer] = {}
        self._stop = threading.Event()

    def run(self, progress: Progress) -> None:
        """Train everything, then time each rule while nothing else runs."""
        # Compiling and small matrix products use one core each: as many rules at once as there are cores.
        pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        try:
            jobs = [job for jobs in pool.map(self._jobs_of, self._titles) for job in jobs]
            futures = [pool.submit(self._train, progress, *job) for job in jobs]
            while wait(futures, timeout=0.2).not_done:
                if any(future.done() and future.exception() for future in futures):
                    break
            for future in futures:
                future.result()
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        for (title, rule), trainer in self._trainers.items():
            self.results[title][rule].milliseconds_per_step = trainer.milliseconds_per_step()

    def _jobs_of(self, title: str) -> list[tuple]:
        """The arguments of ``_train`` for every rule on a task."""
        config, name = self._config, self._titles[title]
        task = TASKS[name](**{option: config[name][option] for option in TASK_OPTIONS[name]})
        start, measured = make_start(task, tuple(config.seeds), config[name]), make_measured(task)
        return [(title, rule, task, start, measured, config[name]) for rule in config.rules]

    def _train(
        self,
        progress: Progress,
        title: str,
        rule: str,
        task: Task,
        start: Start,
        measured: Callable,
        config: ml_collections.ConfigDict,
    ) -> None:
        bar = progress.add_task(f"{title.split(',')[0].split(' ')[0]}: {rule}", total=config.updates, note="compiling")
        trainer = self._trainers[title, rule] = Trainer(task, rule, start, measured, config)
        result = self.results[title][rule]
        result.trace_bytes = trainer.trace_bytes()
        for record in trainer.records():
            result.records.append(record)
            progress.update(bar, completed=record.update, note=f"accuracy {record.accuracy.mean():.3f}")
            if self._stop.is_set():
                return


def main(arguments: list[str] | None = None, config: ml_collections.ConfigDict | None = None) -> int:
    """Run the demo; returns the exit status (130 after Ctrl-C)."""
    parser = Parser("experiments.demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for demo.md and demo.png")
    out = parser.parse_args(arguments).out
    console = Console()
    console.print("Learning rules on the same seeds. All but BPTT run forward in time, by traces alone.\n")
    start = time.perf_counter()
    demo = Demo(config or get_config())
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    interrupted = False
    try:
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            demo.run(progress)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[bold]Interrupted: the tables show what was known by then.[/bold]")

    for title, results in demo.results.items():
        console.print(rich_table(title, results, demo.threshold))
        console.print()
    console.print("Cosine and norm ratio: the lower layer's gradient against BPTT's, median over training.")
    console.print("BPTT has no traces: it stores every step of the sequence instead.")
    if not interrupted:
        out.mkdir(parents=True, exist_ok=True)
        tables = [markdown_table(title, results, demo.threshold) for title, results in demo.results.items()]
        (out / "demo.md").write_text("\n\n".join(tables) + "\n")
        draw_curves(demo.results, out / "demo.png")
        console.print(f"{time.perf_counter() - start:.0f} s; learning curves in {out / 'demo.png'}")
    return 130 if interrupted else 0
