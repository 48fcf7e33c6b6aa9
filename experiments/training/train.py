"""Train one network by one rule on one task; resumes by itself, bit for bit, after a kill at any moment.

    python -m experiments.training --config=configs/xor_count.py [--config.rule="hops = 0" ...] [--workdir=FOLDER]
    python -m experiments.training --config=configs/xor_count.py --help        # every field with its value

In the folder (default ``results/train/<name of the configuration's file>``):

* ``metrics.jsonl``: a line per evaluation: ``batch`` (training batches seen), ``update`` (optimiser updates made),
  ``train_loss`` (per sequence, mean since the line before), ``test_accuracy`` and ``test_loss`` (per sequence); at the
  start, the middle and the end also ``layers``, each layer's gradient by the rule beside that of BPTT. What is
  undefined or not finite is null. With ``--config.meter=True`` also ``meter``, the running estimate of the gradient's
  relative error against BPTT's, with its standard error and that of every node.
* ``timings.jsonl``: a line per evaluation, kept apart so that metrics repeat bit for bit.
* ``checkpoints/``, ``config.json``, ``commits`` (of the programs that trained) and, where tensorboardX is installed,
  ``tensorboard/``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

try:
    import ml_collections

    from experiments.training import settings
except ModuleNotFoundError as error:
    raise ImportError(f"{error}. Training needs more packages: pip install -e '.[experiments]'") from error
from experiments.program.commit import commit
from experiments.program.refusal import Refused
from experiments.training.against_bptt import quotient
from experiments.training.loop import Learning, Loop
from experiments.training.settings import Settings
from experiments.training.workdir import InUse, OtherConfig, Workdir

try:
    from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None


class Run:
    """A training run in its folder, begun or gone on with."""

    def __init__(self, setting: Settings, workdir: Workdir) -> None:
        self.config, self._length, self._workdir = setting.config, setting.length, workdir
        self._updates_per_batch = setting.length // setting.update_every
        self._loop = Loop(
            setting.task,
            setting.rule,
            setting.optimiser,
            setting.update_every,
            self.config.evaluate_every,
            self.config.meter,
        )
        self.batch, self._key = workdir.newest() or 0, jax.random.key(self.config.seed)
        evaluations = self.config.batches // self.config.evaluate_every
        self._compared = {0, evaluations // 2 * self.config.evaluate_every, self.config.batches}

    def train(self, progress: Progress) -> None:
        """From the newest checkpoint to the last batch."""
        config = self.config
        resumed = self._workdir.newest()
        self._workdir.truncate(resumed)
        bar = progress.add_task(config.rule, total=config.batches, completed=self.batch, note="compiling")
        with self._board() as board:
            self._train_on(resumed, progress, bar, board)

    def _train_on(self, resumed: int | None, progress: Progress, bar: TaskID, board: Any) -> None:
        config = self.config
        learning = self._first() if resumed is None else self.restored(resumed)
        if resumed is None:
            self._write(self._measured(learning, None), board)
        compiled = False
        while self.batch < config.batches:
            start = time.perf_counter()
            learning, loss = jax.block_until_ready(self._loop.advance(learning, self._key, np.int32(self.batch)))
            seconds = time.perf_counter() - start
            self.batch += config.evaluate_every
            metrics = self._measured(learning, quotient(float(loss), 1))
            self._write(metrics, board)
            rate = config.evaluate_every * self._length / seconds
            timing = {"batch": self.batch, "seconds": seconds, "steps_per_second": rate, "compiling": not compiled}
            self._workdir.append("timings", timing)
            compiled = True
            if self.batch % config.checkpoint_every == 0 or self.batch == config.batches:
                self._workdir.save(self.batch, self._state(learning))
            note = f"accuracy {metrics['test_accuracy']:.3f}, {rate:,.0f} steps/s"
            if metrics.get("meter") is not None:
                note += f", error {metrics['meter']:.2f} ± {metrics['meter_uncertainty']:.2f}"
            progress.update(bar, completed=self.batch, note=note)

    @contextlib.contextmanager
    def _board(self) -> Iterator[Any]:
        """TensorBoard's events, at first those of the metrics that are kept: a killed program's may be too few."""
        if SummaryWriter is None:
            yield None
            return
        folder = self._workdir.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(str(folder)) as board:
            for metrics in self._workdir.lines("metrics"):
                show(board, metrics)
            yield board

    def _first(self) -> Learning:
        return self._loop.start(self._key)

    def _state(self, learning: Learning) -> dict[str, Any]:
        return {"learning": learning, "key": jax.random.key_data(self._key)}

    def restored(self, batch: int) -> Learning:
        """The checkpoint of a batch; its random key becomes the run's."""
        state = self._workdir.restore(batch, jax.eval_shape(lambda: self._state(self._first())))
        self._key = jax.random.wrap_key_data(state["key"])
        return state["learning"]

    def _measured(self, learning: Learning, loss: float | None) -> dict[str, Any]:
        metrics = {
            "batch": self.batch,
            "update": self.batch * self._updates_per_batch,
            "train_loss": loss,
            **self._loop.test(learning.params),
            **self._loop.error(learning),
        }
        if self.batch in self._compared:
            metrics["layers"] = self._loop.fidelity(learning, self._key, self.batch)
        return metrics

    def _write(self, metrics: dict[str, Any], board: Any) -> None:
        self._workdir.append("metrics", metrics)
        if board is not None:
            show(board, metrics)
            board.flush()


def trained(folder: Path, task: str | None = None) -> tuple[Settings, Any]:
    """What a folder's configuration stands for, and the parameters of its newest checkpoint; nothing is changed there.

    Args:
      task: the only one that will do.

    Raises:
      Refused: there is no such run in the folder, or no checkpoint yet.
    """
    stored, needed = folder / "config.json", "" if task is None else f" of the task {task!r}"
    if not stored.is_file():
        raise Refused(f"{folder} holds no run of experiments.training. Needed: the --workdir of a run{needed}.")
    config = ml_collections.ConfigDict(json.loads(stored.read_text()))
    if task not in (None, config.task):
        raise Refused(f"{folder} holds a run of the task {config.task!r}. Needed: one{needed}.")
    setting = settings.make(config)
    workdir = Workdir(folder, config.to_dict(), read_only=True)
    try:
        newest = workdir.newest()
        if newest is None:
            raise Refused(f"The run in {folder} has no checkpoint yet. Train on: the same command goes on.")
        return setting, Run(setting, workdir).restored(newest).params
    finally:
        workdir.close()


def show(board: Any, metrics: dict[str, Any]) -> None:
    """A line of metrics on TensorBoard."""
    named = {name: metrics.get(name) for name in ("train_loss", "test_accuracy", "test_loss", "meter")}
    for layer, figures in enumerate(metrics.get("layers", [])):
        named |= {f"layer {layer}/{name}": value for name, value in figures.items()}
    for name, value in named.items():
        if value is not None:
            board.add_scalar(name, value, metrics["batch"])


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status (2 for what is refused, 130 after Ctrl-C)."""
    console = Console()
    arguments = sys.argv[1:] if arguments is None else arguments
    asked = {"--help", "-h"} & set(arguments)
    rest = [argument for argument in arguments if argument not in asked]
    if asked and not rest:
        print(__doc__)
        return 0
    try:
        config, path = settings.read(rest)
        if asked:
            print("\n".join(f"--config.{name}={value}" for name, value in settings.fields(config).items()))
            return 0
        setting = settings.make(config)
        workdir = Workdir(Path(path), config.to_dict())
    except (Refused, OtherConfig, InUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if workdir.newest() == config.batches:
        workdir.close()
        console.print(f"{path} is complete; nothing to do.")
        return 0
    workdir.trained_at(commit())
    if SummaryWriter is None:
        console.print("No TensorBoard: it needs tensorboardX (pip install -e '.\\[experiments]').")
    run = Run(setting, workdir)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            run.train(progress)
    except KeyboardInterrupt:
        console.print("[bold]Interrupted. The same command goes on from the newest checkpoint.[/bold]")
        return 130
    finally:
        workdir.close()
    console.print(f"Metrics in {path / 'metrics.jsonl'}")
    return 0
