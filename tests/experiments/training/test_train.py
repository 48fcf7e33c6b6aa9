"""The training program: what it refuses, that it goes on bit for bit, that rules and updates are what they say."""

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
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest

from configs import digits, xor_count
from deepeprop_jax import OnlineLearner, deep_eprop, stack
from experiments.program.refusal import Refused
from experiments.tasks.catalogue import TASKS, Task, independent
from experiments.tasks.targets import Targets, cross_entropy
from experiments.training import settings, train
from experiments.training.loop import Learning, Loop, compare
from experiments.training.rules import RULES
from experiments.training.workdir import Workdir
from tests.experiments.training import board
from tests.gradients import FLOAT64, assert_same_gradient

ROOT = Path(__file__).parents[3]
XOR = "--config=configs/xor_count.py"
STEPS, BATCH, INPUTS, CLASSES, RATE = 12, 3, 2, 2, 0.5


def dense_task(continues: bool = False) -> Task:
    """Two recurrent layers with cross-talk between units, so that no two rules agree by accident; loss at each step."""
    cells = [nn.SimpleCell(features, param_dtype=jnp.float64) for features in (4, 5)]

    def sample(key: jax.Array) -> tuple[jax.Array, Targets]:
        xs = jax.random.normal(key, (STEPS, BATCH, INPUTS))
        return xs, Targets((xs.sum(-1).cumsum(0) > 0).astype(jnp.int32), jnp.ones((STEPS, BATCH)))

    network = stack(*cells, nn.Dense(CLASSES, param_dtype=jnp.float64))
    return Task(network, independent(sample), lambda: sample(jax.random.key(9)), continues=continues)


@functools.cache
def beginning() -> Learning:
    """Before anything is learnt: the same for every rule."""
    task = dense_task()
    rule = RULES["BPTT"](task.network, cross_entropy)
    return Loop(task, rule, optax.sgd(RATE), STEPS, batches_per_call=2).start(jax.random.key(0))


@functools.cache
def learnt(rule: str, update_every: int = STEPS, continues: bool = False) -> tuple[Learning, Learning, jax.Array]:
    """Before and after two batches of plain gradient descent, and the mean loss."""
    task = dense_task(continues)
    loop = Loop(task, RULES[rule](task.network, cross_entropy), optax.sgd(RATE), update_every, batches_per_call=2)
    first = loop.start(jax.random.key(0)) if continues else beginning()
    return first, *loop.advance(first, jax.random.key(0), np.int32(0))


def change(rule: str) -> tuple:
    """What two batches did to the parameters: the sum of two gradients, the second at other parameters."""
    first, last, _ = learnt(rule)
    return optax.tree.sub(last.params, first.params)


def moved(tree) -> bool:
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns_two_batches(rule: str) -> None:
    _, last, loss = learnt(rule)
    assert np.isfinite(loss) and loss > 0
    chex.assert_tree_all_finite(last)
    frozen = {"lower frozen": [0], "readout only": [0, 1]}.get(rule, [])
    assert [moved(layer) for layer in change(rule)] == [layer not in frozen for layer in range(3)]


@pytest.mark.parametrize(
    "rule, same, other",
    [
        ("TBPTT(50)", "BPTT", "TBPTT(10)"),
        ("exact RTRL", "BPTT", "deep e-prop"),
        ("exact in segments", "BPTT", "e-prop in segments"),
        ("e-prop in segments", "deep e-prop", "hops = 0"),
        ("immediate only", "TBPTT(1)", "hops = 0"),
        # One recurrent layer lies above the lower one.
        ("hops = 1", "deep e-prop", "hops = 0"),
    ],
)
def test_rules_that_must_agree_do_and_others_do_not(rule: str, same: str, other: str) -> None:
    assert_same_gradient(change(rule), change(same), FLOAT64)
    with pytest.raises(AssertionError):
        assert_same_gradient(change(rule), change(other), 1e-3)


@functools.cache
def step_by_step() -> tuple[OnlineLearner, Callable]:
    """Deep e-prop of the dense task, and one step of it with that step's contribution to the gradient."""
    learner = deep_eprop(dense_task().network)

    @jax.jit
    def step(params, state, x, target):
        state, y = learner.step(params, state, x)
        return state, learner.gradient(params, state, jax.grad(cross_entropy)(y, target))

    return learner, step


@pytest.mark.parametrize("update_every, continues", [(STEPS, False), (4, False), (4, True)])
def test_updates_are_those_of_the_learner_taken_step_by_step(update_every: int, continues: bool) -> None:
    """The gradient of each piece at the parameters of its time; traces stay over an update, and over a batch that
    continues the one before."""
    task = dense_task()
    learner, step = step_by_step()
    first, last, _ = learnt("deep e-prop", update_every, continues)
    params = first.params
    carry = task.network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS)))[1]

    state = learner.init(params, carry, jnp.zeros((BATCH, INPUTS)))
    for index in range(2):
        xs, targets = task.sample(jax.random.key(0), index)
        state = state if continues else learner.init(params, carry, xs[0])
        for start in range(0, STEPS, update_every):
            total = optax.tree.zeros_like(params)
            for t in range(start, start + update_every):
                state, grads = step(params, state, xs[t], jax.tree.map(lambda leaf, t=t: leaf[t], targets))
                total = optax.tree.add(total, grads)
            params = optax.apply_updates(params, optax.tree.scale(-RATE, total))
    assert_same_gradient(last.params, params, FLOAT64)
    assert (last.stream is not None) == continues
    if continues:
        assert_same_gradient(last.stream.carry, state.carry, FLOAT64)


def test_figures_of_a_layer() -> None:
    found = compare({"a": jnp.array([3.0]), "b": jnp.array([0.0])}, {"a": jnp.array([1.0]), "b": jnp.array([1.0])})
    assert found == pytest.approx({"cosine": 0.5**0.5, "relative_error": 2.5**0.5, "norm_ratio": 4.5**0.5})
    nothing = {"cosine": None, "relative_error": None, "norm_ratio": None}
    assert compare((), ()) == nothing
    assert compare(jnp.ones(1), jnp.zeros(1)) == nothing
    assert compare(jnp.full(1, jnp.nan), jnp.ones(1)) == nothing
    assert compare(jnp.zeros(1), jnp.ones(1)) == {"cosine": None, "relative_error": 1, "norm_ratio": 0}


# What is refused.


@pytest.fixture
def compilations() -> list[str]:
    """Grows by every program that XLA compiles."""
    seen: list[str] = []
    listening = True

    def listen(event: str, seconds: float, **_) -> None:
        if listening and "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    listening = False


REFUSED: list[tuple[list[str], str]] = [
    ([], "No configuration given"),
    (["--config=configs/xor_cont.py"], "configs/xor_count.py'"),
    ([XOR, "--wrkdir=x"], "workdir"),
    ([XOR, "BPTT"], "Seen 'BPTT'"),
    ([XOR, "--config.rul=BPTT"], "Did you mean 'rule'"),
    ([XOR, "--config.xor_count.dely=3"], "Did you mean 'xor_count.delay'"),
    ([XOR, "--config.batches=many"], "many"),
    ([XOR, "--config.rule=deep eprop"], "Did you mean 'deep e-prop'"),
    ([XOR, "--config.rule=TBPTT(5)"], r"Did you mean 'TBPTT\(50\)'"),
    ([XOR, "--config.task=xor"], "Did you mean 'xor_count'"),
    ([XOR, "--config.task=digits"], "Start from configs/digits.py"),
    ([XOR, "--config.optimiser=adma"], "Did you mean 'adam'"),
    ([XOR, "--config.rule=BPTT", "--config.segment_length=5"], "'BPTT' has none.*deep e-prop"),
    ([XOR, "--config.rule=readout only", "--config.rank=2"], "'readout only' has none.*deep e-prop"),
    ([XOR, "--config.rank=0"], "rank must be"),
    ([XOR, "--config.clip=1.0"], "'adam' has none.*sgd"),
    ([XOR, "--config.update_every=7"], "does not divide.*25 steps.*1, 5, 25"),
    ([XOR, "--config.update_every=0"], "does not divide"),
    ([XOR, "--config.rule=BPTT", "--config.update_every=5"], "at the end of the sequence only"),
    ([XOR, "--config.rule=TBPTT(10)", "--config.update_every=5"], "pieces of 10 steps"),
    ([XOR, "--config.segment_length=2", "--config.update_every=5"], "pieces of 2 steps"),
    ([XOR, "--config.evaluate_every=7"], "evaluate_every must divide batches"),
    ([XOR, "--config.checkpoint_every=75"], "evaluate_every must divide checkpoint_every"),
    (["--config=configs/digits.py", "--config.digits.cell=GRU"], "Did you mean 'GRUCell'"),
    (["--config=configs/digits.py", "--config.digits.layers=0"], "layers must be an integer >= 1"),
    ([XOR, "--config.batches=0"], "batches must be above 0"),
    ([XOR, "--config.optimiser=sgd", "--config.clip=-1.0"], "clip must be above 0"),
    ([XOR, "--config.learning_rate=nan"], "learning_rate must be above 0 and finite; seen nan"),
    ([XOR, "--config.xor_count.features=0"], "features must be an integer >= 1"),
    ([XOR, "--config.xor_count.decay=7.0"], "decay must be in"),
    (["--config=README.md"], "README.md"),
    ([XOR, "--config.xor_count.cues=4"], "odd number of cues"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_what_cannot_be_run_is_refused_before_compiling(
    arguments: list[str], message: str, compilations: list[str], monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Refused, match=message):
        settings.make(settings.read(arguments)[0])
    assert not compilations
    assert train.main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run").exists()


def test_the_listener_hears_a_compilation(compilations: list[str]) -> None:
    jax.jit(lambda x: x + 1)(jnp.zeros(17))
    assert compilations


def test_fields_of_a_file_that_are_missing_or_strange_are_refused() -> None:
    config = xor_count.get_config()
    del config.xor_count["delay"]
    with pytest.raises(Refused, match=r"Missing option of xor_count: delay"):
        settings.make(config)
    config = xor_count.get_config()
    config.ranks = 3
    with pytest.raises(Refused, match="Did you mean 'rank'"):
        settings.make(config)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("file", [xor_count, digits])
def test_every_rule_can_be_chosen_on_every_task(rule: str, file) -> None:
    config = file.get_config()
    config.rule = rule
    made = settings.make(config)
    assert made.update_every == made.length


@pytest.mark.mixed_promotion
def test_online_updates_and_options_can_be_chosen() -> None:
    config = xor_count.get_config()
    config.update({"rule": "exact in segments", "segment_length": 5, "rank": 2, "update_every": 5})
    config.update({"optimiser": "sgd", "clip": 0.5})
    made = settings.make(config)
    assert (made.rule.period, made.update_every) == (5, 5)
    grads = {"a": jnp.array([3.0, 4.0])}
    steps, _ = made.optimiser.update(grads, made.optimiser.init(grads), grads)
    np.testing.assert_allclose(steps["a"], -config.learning_rate * 0.5 * np.array([0.6, 0.8]), rtol=1e-6)


# That a run goes on as if nothing had happened.


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
