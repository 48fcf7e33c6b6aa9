"""The training program: a run that was killed goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest

from experiments.tasks.catalogue import TASKS
from experiments.training import train
from experiments.training.loop import Loop
from experiments.training.workdir import Workdir
from tests.experiments.training import board
from tests.experiments.training.dense import dense_task

ROOT = Path(__file__).parents[3]
XOR = "--config=configs/xor_count.py"


def batches(path: Path, name: str) -> list[int]:
    return [json.loads(line)["batch"] for line in (path / f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(seen: Path, needed: Path) -> None:
    """Metrics, TensorBoard's events and the last checkpoint, bit for bit."""
    assert (seen / "metrics.jsonl").read_bytes() == (needed / "metrics.jsonl").read_bytes()
    assert batches(seen, "timings") == batches(needed, "timings")
    assert board.scalars(seen / "tensorboard") == board.scalars(needed / "tensorboard") != []
    states = []
    for path in (seen, needed):
        with orbax.CheckpointManager(path / "checkpoints") as manager:
            states.append(manager.restore(manager.latest_step(), args=orbax.args.StandardRestore()))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    pairs = zip(jax.tree.leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True)
    assert [path for (path, leaf), other in pairs if np.asarray(leaf).tobytes() != np.asarray(other).tobytes()] == []


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch) -> tuple[Callable[[str], int], Callable[[], Loop]]:
    """Runs a task that continues, with online updates, into a folder; and the compiled loop that all runs share.

    What a checkpoint gives back has the types that it was saved with: training is traced once, resumed or not.
    """
    chex.clear_trace_counter()
    monkeypatch.setattr(Loop, "_advance", chex.assert_max_traces(Loop._advance, n=1))
    monkeypatch.setitem(TASKS, "dense", lambda: dense_task(continues=True))
    file = tmp_path / "dense.py"
    file.write_text(
        "from configs.common import training\n"
        "def get_config():\n"
        "    config = training()\n"
        "    config.update(task='dense', dense={}, update_every=4, batches=4, evaluate_every=2, checkpoint_every=2)\n"
        "    return config\n"
    )
    shared = functools.cache(lambda: Loop(*made))
    made: list = []

    def loop(*arguments) -> Loop:
        made[:] = made or arguments
        return shared()

    monkeypatch.setattr(train, "Loop", loop)
    return lambda name: train.main([f"--config={file}", f"--workdir={tmp_path / name}"]), shared


@pytest.mark.slow
@pytest.mark.mixed_promotion
def test_a_run_killed_at_any_write_goes_on_bit_for_bit(
    small_run: tuple[Callable[[str], int], Callable[[], Loop]], tmp_path: Path, monkeypatch, capsys
) -> None:
    run, loop = small_run
    append, save = Workdir.append, Workdir.save
    countdown = [-1]
    kinds: list[str] = []

    def killed_append(self, name: str, line: dict) -> None:
        kinds.append(name)
        if countdown[0] == 0:
            with (self.path / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(line)[:9])
            raise Killed
        countdown[0] -= 1
        append(self, name, line)

    def killed_save(self, batch: int, state) -> None:
        kinds.append("checkpoint")
        if countdown[0] == 0:
            raise Killed
        countdown[0] -= 1
        save(self, batch, state)

    monkeypatch.setattr(Workdir, "append", killed_append)
    monkeypatch.setattr(Workdir, "save", killed_save)
    assert run("whole") == 0
    assert batches(tmp_path / "whole", "metrics") == [0, 2, 4]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 6, 12]
    assert [line["batch"] for line in lines if "layers" in line] == [0, 2, 4]
    assert all(0 < figures["cosine"] <= 1 + 1e-9 for figures in lines[0]["layers"])
    key = jax.random.key(0)
    learning, first_loss = loop().advance(loop().start(key), key, np.int32(0))
    learning, second_loss = loop().advance(learning, key, np.int32(2))
    assert [line["train_loss"] for line in lines] == [None, float(first_loss), float(second_loss)]
    tested = loop().test(learning.params)
    assert 0 < tested["test_accuracy"] <= 1 and tested["test_loss"] > 0
    assert {name: lines[2][name] for name in tested} == tested
    events = list(kinds)
    assert events.count("checkpoint") == 2

    for moment in range(len(events)):
        name = f"killed at {moment}"
        countdown[0] = moment
        with pytest.raises(Killed):
            run(name)
        countdown[0] = -1
        assert run(name) == 0
        assert_same_run(tmp_path / name, tmp_path / "whole")

    kinds.clear()
    capsys.readouterr()
    assert run("whole") == 0
    assert not kinds and "complete" in capsys.readouterr().out


def test_a_process_killed_in_the_middle_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {"batches": 100, "evaluate_every": 5, "checkpoint_every": 10, "rule": "hops = 0"}
    options |= {"xor_count.features": 4, "xor_count.batch": 4, "xor_count.test_size": 16}
    command = [sys.executable, "-m", "experiments.training", XOR]
    command += [f"--config.{name}={value}" for name, value in options.items()]

    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # The user's own place for compiled programs, which those that come later then find there.
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(name: str) -> subprocess.Popen:
        folder = f"--workdir={tmp_path / name}"
        return subprocess.Popen([*command, folder], cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)

    assert start("whole").wait(timeout=300) == 0
    assert any((tmp_path / "own").iterdir())
    process = start("killed")
    try:
        checkpoint = tmp_path / "killed" / "checkpoints" / "20"
        deadline = time.monotonic() + 300
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 20 <= batches(tmp_path / "killed", "timings")[-1] < 100
    assert start("killed").wait(timeout=300) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
