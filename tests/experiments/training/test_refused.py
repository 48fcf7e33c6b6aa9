"""What cannot be run is refused before anything is compiled; what can be chosen is made."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, xor_count
from experiments.program.refusal import Refused
from experiments.training import settings, train
from experiments.training.rules import RULES

ROOT = Path(__file__).parents[3]
XOR = "--config=configs/xor_count.py"


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
