"""The benchmarks, made tiny: tables, JSON and pictures come out, and every time stands beside the right error."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from deepeprop_jax import compare_to_bptt, deep_eprop
from deepeprop_jax.reference import bptt
from experiments.benchmarks import associative, document, kernels, machine, rivals, run
from experiments.benchmarks.cost_model import cost
from experiments.benchmarks.measure import REFERENCE, Comparison, calls_of, compare
from experiments.benchmarks.problems import CELLS, Problem, squared_error
from experiments.benchmarks.report import HEADER, markdown, ratio
from experiments.benchmarks.rivals import RIVALS
from experiments.benchmarks.suites import SUITES, Suite, only
from experiments.program import pages
from experiments.training.against_bptt import compare_layers

ROOT = Path(__file__).parents[3]
TINY = Problem("leaky tanh", 4, steps=7, batch=2, segment=3, inputs=2)
SMALLER = TINY._replace(features=3)
OURS = [name for name in RIVALS if name.split(" ")[0] not in rivals.peer.LIBRARIES]
EXACT = ("BPTT, hoisted", "BPTT, checkpointed", "jacfwd", "exact", "exact, C = 1", "stream, exact")
SAME = {
    "hops=0": ("hops=0, C = 1", "stream, hops=0"),
    "all hops": ("all hops, C = 1", "stream, all hops"),
}


def relative_errors(grads: tuple, reference: tuple) -> list[float | None]:
    return [layer["relative_error"] for layer in compare_layers(grads, reference)]


QUICK = (REFERENCE, *EXACT, *SAME, *(name for names in SAME.values() for name in names), "hops=0, exact inside")


def measured(names: tuple[str, ...]) -> dict:
    """Rivals on the smallest problem."""
    found: dict = {}
    compare(Comparison(TINY, names), 2, found, lambda what: None)
    return found


@pytest.fixture(scope="module")
def record() -> dict:
    """Those whose errors are known."""
    return measured(QUICK)


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A machine that is measured in no time."""
    found = machine.measure(1, gemm_sizes=((8, 8, 8),), numbers=64)
    monkeypatch.setattr(run, "measure", lambda rounds: found)
    return found


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(OURS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_rival_has_its_times_memory_and_error(record: dict, names: tuple[str, ...]) -> None:
    record = record if names == QUICK else measured(names)
    assert tuple(record["rivals"]) == names
    for name, entry in record["rivals"].items():
        assert len(entry["cpu"]) == len(entry["wall"]) == 2 and min(entry["wall"]) > 0
        assert entry["compile_cpu"][0] > 0 and entry["temporary_bytes"] > 0 and entry["state_bytes"] > 0
        assert ("errors" in entry) == RIVALS[name](TINY).gives_gradient


@pytest.mark.parametrize("name", EXACT)
def test_exact_rivals_have_no_error(record: dict, name: str) -> None:
    assert len(record["rivals"][name]["errors"]) == TINY.layers
    assert max(record["rivals"][name]["errors"]) < 1e-9


def test_errors_of_one_rule_are_those_of_that_rule(record: dict) -> None:
    """However it is computed, and with the figures that the library itself reports."""
    params, carry, xs, targets = TINY.data()
    for name, others in SAME.items():
        errors = record["rivals"][name]["errors"]
        assert min(errors) > 0.01
        for other in others:
            assert record["rivals"][other]["errors"] == pytest.approx(errors, rel=1e-9)
        learner = deep_eprop(TINY.network(), hops=0 if name == "hops=0" else None)
        _, grads = jax.jit(learner.value_and_grad(squared_error))(
            params, learner.init(params, carry, xs[0]), xs, targets
        )
        _, reference = jax.jit(bptt(TINY.network(), squared_error))(params, carry, xs, targets)
        assert relative_errors(grads, reference) == pytest.approx(errors, rel=1e-9)


def test_errors_agree_with_compare_to_bptt() -> None:
    one_layer = TINY._replace(layers=1)
    params, carry, xs, targets = one_layer.data()
    learner = deep_eprop(one_layer.network())
    _, grads = learner.value_and_grad(squared_error)(params, learner.init(params, carry, xs[0]), xs, targets)
    _, reference = bptt(one_layer.network(), squared_error)(params, carry, xs, targets)
    total = compare_to_bptt(learner, params, carry, xs, targets, squared_error).total
    assert relative_errors(grads, reference) == pytest.approx([total.relative_error], rel=1e-9)


def test_exact_inside_a_segment_is_closer(record: dict) -> None:
    top = {name: entry["errors"][-1] for name, entry in record["rivals"].items() if "errors" in entry}
    assert top["hops=0, exact inside"] < top["hops=0"]


def test_descent_moves_the_parameters_against_the_gradient() -> None:
    rival, exact = RIVALS["stream, hops=0, descent"](TINY), RIVALS["stream, hops=0"](TINY)
    arguments = rival.arguments(TINY)
    moved, summed = rival.run(*arguments)[1], exact.run(*arguments)[1]
    for before, after, g in zip(*map(jax.tree.leaves, (arguments[0], moved, summed)), strict=True):
        # As the parameters move, each gradient is taken a little elsewhere.
        np.testing.assert_allclose(after - before, -rivals.STREAM_RATE * g, rtol=1e-3)


def test_a_suite_writes_table_json_and_picture(tmp_path: Path, quick_machine: dict, capsys) -> None:
    names = (REFERENCE, "hops=0")
    timed = Comparison(TINY, names)
    untimed = Comparison(TINY._replace(steps=5), names, timed=False, compiles=2)
    bars, lines = Suite("bars", (timed,)), Suite("lines", (timed, untimed), "temporary_bytes", ("steps",))
    assert run.run_suites({"bars": bars, "lines": lines}, 2, tmp_path) == 0
    for name, suite in {"bars": bars, "lines": lines}.items():
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert [len(record["rivals"]) for record in stored["comparisons"]] == [2] * len(suite.comparisons)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        table = (tmp_path / f"{name}.md").read_text()
        assert table.strip() == markdown(stored)
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| hops=0")]
        assert len(rows) == len(suite.comparisons) and all(len(row) == len(HEADER) for row in rows)
    assert len(stored["comparisons"][1]["rivals"]["hops=0"]["compile_cpu"]) == 2
    assert "hops=0" in capsys.readouterr().out


def test_ratios_are_of_medians_and_of_minima() -> None:
    ours, theirs = {"cpu": [3.0, 9.0, 6.0]}, {"cpu": [2.0, 4.0, 1.0]}
    assert ratio(ours, theirs, "cpu") == (3.0, 3.0)
    assert ratio(ours, {}, "cpu") is None and ratio(ours, None, "cpu") is None


def test_ctrl_c_keeps_what_is_known(tmp_path, quick_machine, monkeypatch, capsys) -> None:
    def interrupted(calls, rounds, samples, after_each) -> None:
        for name in calls:
            samples[name].append(run_sample)
            after_each(name)
        raise KeyboardInterrupt

    run_sample = machine.timed(lambda: jax.numpy.zeros(1))[1]
    monkeypatch.setattr("experiments.benchmarks.measure.alternate", interrupted)
    suite = Suite("short", (Comparison(TINY, (REFERENCE, "hops=0")), Comparison(TINY, (REFERENCE,))))
    assert run.run_suites({"short": suite}, 7, tmp_path) == 130
    stored = json.loads((tmp_path / "short.json").read_text())
    assert stored["interrupted"] and len(stored["comparisons"]) == 1
    assert len(stored["comparisons"][0]["rivals"]["hops=0"]["cpu"]) == 1
    assert "Interrupted" in capsys.readouterr().out


def test_a_missing_peer_is_said_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, _ in rivals.peer.LIBRARIES.values():
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    found: dict = {}
    compare(Comparison(TINY, (REFERENCE, "braintrace D_RTRL"), timed=False), 1, found, lambda what: None)
    assert found["rivals"]["braintrace D_RTRL"] == {"missing": "braintrace is not installed"}
    assert "leaky tanh" in rivals.missing("braintrace D_RTRL", TINY._replace(cell="GRU"))
    assert rivals.missing("memorax RTRL", TINY._replace(cell="RTU")) == "memorax is not installed"


def test_the_cost_model_by_hand() -> None:
    """Two tanh layers of 3 units on 2 inputs: 18 and 21 parameters, 6 carry numbers, batch 2, C = 3."""
    weights, own, cross = 18 + 21, 18 + 21, 3 * 18
    assert cost("BPTT", SMALLER) == (3 * 2 * weights, 8 * weights)
    assert cost("hops=0", SMALLER).multiply_adds == pytest.approx(2 * (3 * weights + own * (1 + 2 / 3)))
    assert cost("all hops", SMALLER).bytes == pytest.approx((12 * 2 * (own + cross) + 8 * weights) / 3)
    inside, boundary = own + cross, 2 * (own + cross) / 3
    assert cost("all hops", SMALLER).multiply_adds == pytest.approx(2 * (3 * weights + inside + boundary))
    dense = 3 * own + cross
    assert cost("exact, C = 1", SMALLER).multiply_adds == pytest.approx(2 * (3 * weights + dense * (2 + 7)))
    with jax.enable_x64(False):
        # Four gates, each with a kernel on x, one on h and one bias; every weight has two rows, for c and for h.
        lstm, weights = SMALLER._replace(cell="LSTM"), 4 * (6 + 9 + 3) + 4 * (9 + 9 + 3)
        assert cost("hops=0", lstm).multiply_adds == pytest.approx(2 * (3 * weights + 2 * weights * (1 + 3 / 3)))


def test_suites_name_cells_and_rivals_that_exist() -> None:
    for suite in SUITES.values():
        assert sum(calls_of(comparison, 7) for comparison in suite.comparisons) < 2000
        for comparison in suite.comparisons:
            assert set(comparison.rivals) <= set(RIVALS) and comparison.problem.cell in CELLS
            assert comparison.problem.steps % comparison.problem.segment == 0
    cells = [comparison.problem.cell for name in ("acceptance", "peers") for comparison in SUITES[name].comparisons]
    assert set(cells) == set(CELLS)


def test_only_some_comparisons() -> None:
    some = only(SUITES["acceptance"], "ALIF")
    assert [comparison.problem.cell for comparison in some.comparisons] == ["ALIF", "ALIF"]
    assert not only(SUITES["gpu"], "perceptron").comparisons


def test_kernels_are_those_on_a_gpus_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(kind: str, process: int, thread: int, value: str) -> dict:
        return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": value}}

    events = [
        name("process_name", 1, 0, "/device:GPU:0"),
        name("process_name", 2, 0, "/host:CPU"),
        name("thread_name", 1, 7, "Stream #7(Compute)"),
        name("thread_name", 1, 8, "XLA Ops"),
        *({"ph": "X", "pid": p, "tid": t, "name": "dot", "dur": 1.5} for p, t in ((1, 7), (1, 7), (1, 8), (2, 7))),
    ]
    assert kernels.on_device(events) == {"dot": (2, 3.0)}
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "cpu")
    assert kernels.main([]) == 1


def test_the_page_says_what_the_kernels_took() -> None:
    page = document.PAGE.read_text()
    (path,) = (ROOT / "docs" / "benchmarks" / "kernels").glob("*.json")
    for program in json.loads(path.read_text())["programs"]:
        wall, busy, launches = (program[key] / program["steps"] for key in ("wall_us", "busy_us", "launches"))
        profiled = " (profiled)" if busy > wall + 1 else ""
        assert f"| {program['rival']} | {wall:.0f} | {busy:.0f}{profiled} | {launches:.0f} |" in page, program[
            "problem"
        ]


@pytest.mark.mixed_promotion
def test_both_ways_through_an_element_wise_recurrence_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 6, "UNITS": 3, "ROUNDS": 2}.items():
        monkeypatch.setattr(associative, name, value)
    found = associative.measure(batch=2)
    assert found["difference"] < 1e-5
    assert [len(way["wall"]) for way in found["ways"].values()] == [2, 2]


def test_the_page_says_what_the_associative_scan_took() -> None:
    page = document.PAGE.read_text()
    (path,) = (ROOT / "docs" / "benchmarks" / "associative").glob("*.json")
    for found in json.loads(path.read_text())["found"]:
        loop, scan = (statistics.median(way["wall"]) * 1e6 for way in found["ways"].values())
        assert f"{loop:.0f} µs in the loop and {scan:.0f} µs" in page


def test_a_part_of_a_suite_is_not_stored_as_the_whole() -> None:
    """In a process of its own: the program holds its process to one processor."""
    command = ["-m", "experiments.benchmarks", "--suite", "gpu", "--only", "GRU", "--out", "docs/benchmarks"]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and "give another --out" in run.stderr


def test_the_performance_page_holds_the_stored_figures() -> None:
    page = document.PAGE.read_text()
    assert document.fill(page, ROOT / "docs" / "benchmarks") == page
    assert set(pages.names(page, "benchmark")) == set(SUITES)


def test_the_page_takes_tables_between_its_markers(tmp_path: Path, record: dict, quick_machine: dict) -> None:
    suite = {"title": "t", "rounds": 2, "interrupted": False, "machine": quick_machine, "comparisons": [record]}
    (tmp_path / "short.json").write_text(json.dumps(suite))
    page = "a\n<!-- benchmark short: note -->\nold\n<!-- end of benchmark short -->\nb"
    filled = document.fill(page, tmp_path)
    assert "old" not in filled and "| hops=0, C = 1 |" in filled and filled.endswith("-->\nb")
    assert document.fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="short"):
        document.fill("<!-- benchmark short: note -->", tmp_path)
