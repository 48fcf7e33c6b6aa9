"""T0: element-wise cells at cosine 1 at any depth, trained or not; the page holds the stored figures."""

from __future__ import annotations

import json
from itertools import product

import pytest

from experiments.program import pages
from experiments.studies import fidelity_modes as fidelity
from experiments.studies import fidelity_rules
from experiments.studies import fidelity_trained as trained
from experiments.studies import fidelity_untrained as study


def test_the_page_shows_the_stored_figures():
    page, stored = pages.EXPERIMENTS.read_text(), json.loads((pages.EXPERIMENTS.parent / study.STORED).read_text())
    assert study.fill(page, stored) == page
    assert [(row["dial"], row["setting"]) for row in stored["rows"]] == [
        (dial, setting._asdict()) for dial, setting in study.settings()
    ]


def test_stored_cosines_are_one_where_units_see_their_own_past_alone():
    stored = json.loads((pages.EXPERIMENTS.parent / study.STORED).read_text())
    rows = [row for row in stored["rows"] if row["setting"]["cell"] in ("LRU", "IndRNN", "LIF")]
    cosines = [layer["cosine"] for row in rows for layer in row["layers"]["deep e-prop"]]
    assert len(cosines) == 3 * study.DEEP
    assert all(cosine > 1 - 1e-6 for cosine in cosines)


@pytest.mark.mixed_promotion
def test_a_measurement_sees_that_hops_are_missing():
    layers = study.measure(study.Setting(cell="IndRNN", depth=2, delay=3, width=4), seeds=1)
    assert [layer["cosine"] for layer in layers["deep e-prop"]] == pytest.approx([1, 1], abs=1e-6)
    assert layers["hops = 0"][0]["cosine"] < 0.999
    assert layers["hops = 0"][1]["cosine"] == pytest.approx(1, abs=1e-6)


def test_the_page_shows_the_stored_figures_of_trained_networks():
    page, stored = pages.EXPERIMENTS.read_text(), json.loads((pages.EXPERIMENTS.parent / trained.STORED).read_text())
    assert trained.fill(page, stored) == page
    assert {name: len(runs) for name, runs in stored["cases"].items()} == dict.fromkeys(trained.CASES, trained.SEEDS)
    # A memory whose units keep to themselves: deep e-prop is BPTT at every moment, hops=0 never.
    runs = stored["cases"]["XOR-count, delay 30"]
    detector = [
        (run["layers"][rule][m][0]["relative_error"]) for rule in trained.COMPARED for run in runs for m in range(4)
    ]
    assert max(detector[: len(detector) // 2]) < 1e-3 < 0.1 < min(detector[len(detector) // 2 :])


def test_the_page_of_the_modes_shows_their_stored_errors():
    stored = json.loads((pages.EXPERIMENTS.parent / fidelity.STORED).read_text())
    assert [(row["mode"], row["cell"]) for row in stored["rows"]] == list(product(fidelity.MODES, fidelity.CELLS))
    page = (pages.EXPERIMENTS.parent / "modes.md").read_text().replace("`", "")
    for tanh, gru in zip(stored["rows"][::2], stored["rows"][1::2], strict=True):
        errors = [f"{tanh[layer]:.2g}; {gru[layer]:.2g}" for layer in ("lower", "upper")]
        assert f"| {tanh['mode']} | tanh; GRU | {errors[0]} | {errors[1]} |" in page


@pytest.mark.mixed_promotion
def test_gradients_are_compared_while_bptt_trains(tmp_path, monkeypatch):
    tiny = {"batches": 4, "evaluate_every": 1, "checkpoint_every": 4, "xor_count.features": 3, "xor_count.batch": 4}
    tiny |= {"xor_count.delay": 2, "xor_count.test_size": 8}
    case = trained.Case("configs/xor_count.py", tiny)
    monkeypatch.setattr(trained, "CASES", {"tiny": case})
    monkeypatch.setattr(trained, "SEEDS", 1)
    assert trained.main(["--out", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / trained.STORED).read_text())["cases"]["tiny"]
    assert run["batches"] == [0, 0, 2, 4]
    assert len(run["test_accuracy"]) == 4
    starts = [run["layers"]["hops = 0"][moment][0]["relative_error"] for moment in range(4)]
    assert starts[0] == starts[1] != starts[2] != starts[3]  # the parameters moved
    for moment in range(4):
        assert run["layers"]["deep e-prop"][moment][0]["relative_error"] < 1e-3
        assert run["layers"]["hops = 0"][moment][-1]["relative_error"] < 1e-3  # the readout
    assert (tmp_path / trained.STORED).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| tiny | BPTT | test accuracy |" in trained.markdown(json.loads((tmp_path / trained.STORED).read_text()))


@pytest.mark.mixed_promotion
def test_of_the_other_rules_those_that_are_exact_have_cosine_1():
    whole, own = (fidelity_rules.figures("LRU", rule, seeds=1) for rule in ("SnAp-2", "SnAp-1 (hops = 0)"))
    assert [layer["cosine"] for layer in whole] == pytest.approx([1, 1], abs=1e-5)
    assert [layer["norm_ratio"] for layer in whole] == pytest.approx([1, 1], abs=1e-5)
    assert own[0]["cosine"] < 0.999
    assert own[1]["cosine"] == pytest.approx(1, abs=1e-5)
