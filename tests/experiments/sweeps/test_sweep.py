"""Sweeps: every combination once, results stored, tables that are those of the stored results."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from experiments.program import pages
from experiments.studies import cosine as cosine_report
from experiments.studies import rates as rates_report
from experiments.sweeps import SWEEPS, results, sweep
from experiments.sweeps import report as sweep_report
from experiments.sweeps.grid import Sweep
from experiments.training import settings, train

TINY = Sweep(
    "tiny",
    "configs/xor_count.py",
    {
        "batches": 2,
        "evaluate_every": 1,
        "checkpoint_every": 2,
        "xor_count.features": 3,
        "xor_count.batch": 4,
        "xor_count.delay": 2,
        "xor_count.test_size": 8,
    },
    {"xor_count.cues": (3,), "rule": ("BPTT",), "seed": (0, 1)},
)


@pytest.mark.mixed_promotion
def test_a_sweep_runs_what_is_missing_and_stores_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SWEEPS, "tiny", TINY)
    monkeypatch.setattr(train, "commit", lambda: "aaa")
    arguments = ["tiny", "--results", str(tmp_path / "runs"), "--out", str(tmp_path)]
    first = tmp_path / "runs" / "tiny" / "cues=3,rule=BPTT,seed=0"
    assert sweep.main(arguments) == 0
    stored = json.loads((tmp_path / "tiny.json").read_text())
    assert [run["fields"]["seed"] for run in stored["runs"]] == [0, 1]
    assert all(run["batch"] == [0, 1, 2] and len(run["test_accuracy"]) == 3 for run in stored["runs"])
    assert stored["runs"][0]["test_accuracy"] != stored["runs"][1]["test_accuracy"]
    assert stored["commit"] == "aaa"
    written = (first / "metrics.jsonl").stat().st_mtime_ns
    # What is complete has been trained at the commit that it was trained at.
    monkeypatch.setattr(train, "commit", lambda: "bbb")
    assert sweep.main(arguments) == 0
    assert json.loads((tmp_path / "tiny.json").read_text())["commit"] == "aaa"
    assert (first / "metrics.jsonl").stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("is complete") == 2
    # A run that was cut short, in the middle of a line too, is not a result.
    (first / "metrics.jsonl").write_text('{"batch": 0, "test_accuracy": 0.5}\n{"batch": 2, "test_acc')
    assert [run["fields"]["seed"] for run in sweep.collect(TINY, tmp_path / "runs" / "tiny")] == [1]
    sweep_report.draw(stored, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_a_refused_sweep_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SWEEPS", {"refused": TINY._replace(config="configs/absent.py"), "tiny": TINY})
    monkeypatch.setattr(sweep.train, "main", lambda arguments: 2 * ("--config=configs/absent.py" in arguments))
    assert sweep.main(["all", "--results", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.glob("*.json")] == ["tiny.json"]
    monkeypatch.setattr(sweep.train, "main", lambda arguments: sweep.INTERRUPTED)
    assert sweep.main(["all", "--results", str(tmp_path / "runs"), "--out", str(tmp_path / "none")]) == 130
    assert not (tmp_path / "none").exists()


@pytest.mark.mixed_promotion
@pytest.mark.usefixtures("recordings")
@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_every_combination_of_every_sweep_is_accepted(name):
    for run in SWEEPS[name].runs():
        config, _ = settings.read([a for a in SWEEPS[name].arguments(run, sweep.RESULTS) if "workdir" not in a])
        if run["seed"] == 0:
            settings.make(config)


def test_a_field_can_be_set_for_one_rule_alone(tmp_path):
    sweep_ = TINY._replace(by_rule={"deep e-prop": {"segment_length": 4}})
    lines = [sweep_.arguments({"rule": rule, "seed": 0}, tmp_path) for rule in ("BPTT", "deep e-prop")]
    assert ["--config.segment_length=4" in line for line in lines] == [False, True]
    assert sweep_.arguments({"seed": 0}, tmp_path)[0] == "--config=configs/xor_count.py"


def run(rule: str, seed: int, accuracies: list[float], cosines: list[float | None]) -> dict:
    layers = [{"cosine": cosine, "norm_ratio": 2.0} for cosine in cosines]
    batches = [10 * i for i in range(len(accuracies))]
    return {
        "fields": {"delay": 5, "rule": rule, "seed": seed},
        "batch": batches,
        "test_accuracy": accuracies,
        "layers": {"0": layers},
    }


def test_the_table_by_hand():
    runs = [
        run("BPTT", 0, [0.5, 0.9, 1.0], [1.0, 1.0]),
        run("BPTT", 1, [0.5, 0.8, 0.98], [1.0, 1.0]),
        run("rule", 0, [0.5, 0.6, 0.8], [None, 0.25]),
        run("rule", 1, [0.5, 0.9, 0.7], [None, 0.75]),
        run("lower frozen", 0, [0.5, 0.5, 0.5], [None, 1.0]),
        run("lower frozen", 1, [0.5, 0.5, 0.5], [None, 1.0]),
    ]
    ((setting, rules),) = results.groups(runs).items()
    assert setting == (("delay", 5),)
    assert sweep_report.row("BPTT", rules, 0.9)[1:5] == ["0.990 ± 0.010", "0.980 to 1.000", "15", "1.00"]
    assert sweep_report.row("rule", rules, 0.9) == [
        *["rule", "0.750 ± 0.050", "0.700 to 0.800", "> 20", "0.51"],
        *["– 0.50", "2.00 2.00"],
    ]
    # The cosine of a gradient that is nothing but rounding is not shown.
    for one in rules["rule"]:
        one["layers"]["0"][1]["norm_ratio"] = 1e-8
    assert sweep_report.row("rule", rules, 0.9)[5:] == ["– –", "2.00 0.00"]
    assert results.gap_closed(runs[:2], {"BPTT": runs[:2]}) is None
    # Where the frozen control is better than BPTT, there is no gap to close.
    assert results.gap_closed(runs[:2], {"BPTT": runs[4:], "lower frozen": runs[:2]}) is None


def test_a_loss_is_shown_in_bits_and_less_is_better():
    losses = {"BPTT": [2.0, 1.0], "rule": [2.0, 1.5], "lower frozen": [2.0, 2.0]}
    runs = [run(rule, 0, [], [1.0]) | {"batch": [0, 10], "test_loss": values} for rule, values in losses.items()]
    for one in runs:
        del one["test_accuracy"]
    ((_, rules),) = results.groups(runs).items()
    assert sweep_report.row("BPTT", rules, 1.5)[1:5] == ["1.443 ± 0.000", "1.443 to 1.443", "10", "1.00"]
    assert sweep_report.row("rule", rules, 1.5)[3:5] == ["> 10", "0.50"]
    assert results.gap_closed([runs[1]], {"BPTT": [runs[2]], "lower frozen": [runs[0]]}) is None
    # A run that diverged has null for a loss, and no figure.
    assert sweep_report.row("rule", {"rule": [runs[1] | {"test_loss": [2.0, None]}]}, 1.5)[1] == "nan ± nan"
    result = {"title": "text", "commit": "0", "threshold": 1.5, "measure": "bits per character"}
    table = sweep_report.markdown("text", result | {"runs": runs})
    assert "| rule | bits per character | lowest to highest seed | batches to 1.5 bits |" in table


def test_other_fields_than_the_rule_can_be_compared():
    runs = [run("BPTT", 0, [0.5, value], [1.0]) for value in (0.6, 0.8)]
    for every, one in zip((1, 5), runs, strict=True):
        one["fields"]["a.update_every"] = every
    result = {
        "title": "XOR",
        "commit": "0",
        "threshold": 0.7,
        "compared": "a.update_every",
        "runs": runs,
    }
    lines = sweep_report.markdown("xor", result).splitlines()
    assert "gap closed" not in "".join(lines)  # there are no controls
    assert "**XOR, delay 5, rule BPTT**" in lines
    assert [line.split("|")[1:3] for line in lines if line.startswith("| ")] == [
        [" update every ", " test accuracy "],
        [" 1 ", " 0.600 ± 0.000 "],
        [" 5 ", " 0.800 ± 0.000 "],
    ]


def test_the_page_holds_the_stored_results():
    page, folder = sweep_report.PAGE.read_text(), sweep_report.PAGE.parent / "experiments"
    assert sweep_report.fill(page, folder) == page
    assert set(pages.names(page, "sweep")) == set(SWEEPS)
    for path in folder.glob("*.json"):
        stored, wanted = json.loads(path.read_text()), SWEEPS[path.stem]
        assert path.with_suffix(".png").exists()
        assert [r["fields"] for r in stored["runs"]] == list(wanted.runs()), (
            "a sweep's results are stored when complete"
        )
        assert stored["fixed"] == wanted.fixed and stored["commit"]
        ran = {r["fields"].get("rule") for r in stored["runs"]}
        both = (stored.get("by_rule", {}), wanted.by_rule)
        here, there = ({rule: fields[rule] for rule in ran & set(fields)} for fields in both)
        assert here == there
        assert (stored["title"], stored["config"], stored["threshold"]) == (
            wanted.title,
            wanted.config,
            wanted.threshold,
        )
        # Older ones were of the only kind that there was.
        assert stored.get("measure", "test accuracy") == wanted.measure
        assert stored.get("compared", "rule") == wanted.compared


def test_the_cosine_beside_the_gap_closed_by_hand():
    faint = {"cosine": 0.99, "norm_ratio": 0.03}
    runs = [run(rule, 0, [0.5, end], [1.0]) for rule, end in (("BPTT", 1.0), ("hops = 0", 0.6), ("lower frozen", 0.5))]
    runs[1]["layers"]["0"] = [faint]
    # The same case in two sweeps is one.
    (case,) = cosine_report.cases([{"runs": runs}, {"runs": runs}, {"runs": runs, "compared": "delay"}])
    assert case == ("hops = 0", 0.99, 0.03, pytest.approx(0.2))
    strong = case._replace(norm_ratio=1.0, gap_closed=0.9)
    # Where there is no gradient there is no cosine, whatever rounding says.
    for nothing in ({"cosine": None, "norm_ratio": 0.0}, {"cosine": 0.5, "norm_ratio": 1e-7}):
        runs[1]["layers"]["0"] = [nothing]
        (silent,) = cosine_report.cases([{"runs": runs}])
        assert silent.cosine is None
    lines = cosine_report.markdown([case, strong, strong._replace(cosine=-0.5, gap_closed=-1.0), silent]).splitlines()
    assert "4 cases" in lines[0] and "of the cosine 0.87" in lines[0]  # 1.5 / √(1.5 · 2)
    assert lines[4:] == [
        "| no gradient | 1 | 0.20 | 0.20 | 0.20 |",
        "| 0.00 to 0.30 | 1 | -1.00 | -1.00 | -1.00 |",
        "| 0.30 to 0.70 | 0 | – | – | – |",
        "| 0.70 to 0.95 | 0 | – | – | – |",
        "| 0.95 to 1.00 | 2 | 0.20 | 0.55 | 0.90 |",
        "| … norm ratio below 0.3 | 1 | 0.20 | 0.20 | 0.20 |",
        "| … norm ratio 0.3 or more | 1 | 0.90 | 0.90 | 0.90 |",
    ]


def test_the_page_holds_the_cosines_of_the_stored_results():
    page = cosine_report.PAGE.read_text()
    assert cosine_report.fill(page, cosine_report.cases(results.stored())) == page


def test_the_best_learning_rate_by_hand():
    runs = [run(rule, seed, [0.5, end], [1.0]) for rule, end in (("BPTT", 1.0), ("hops = 0", 0.6)) for seed in (0, 1)]
    for one in runs:
        del one["fields"]["delay"]
    slow = [one | {"fields": one["fields"] | {"learning_rate": 0.1}} for one in runs]
    fast = [one | {"fields": one["fields"] | {"learning_rate": 1.0}, "test_accuracy": [0.5, 0.8]} for one in runs]
    result = {"title": "XOR", "runs": slow + fast}
    assert rates_report.row(result) == ["XOR", "1.000 (0.1)", "–", "0.800 (1)", "–", "–"]
    # Of bits the fewest: 1 at the large rate, 2 at the small one.
    bits = [one | {"test_loss": [9.0, (1 if one in fast else 2) * math.log(2)]} for one in slow + fast]
    row = rates_report.row(result | {"measure": "bits per character", "runs": bits})
    assert row == ["XOR, bits per character", "1.000 (1)", "–", "1.000 (1)", "–", "–"]
    # With a second setting there is no one best rate.
    deeper = [one | {"fields": one["fields"] | {"depth": 3}} for one in slow]
    assert rates_report.row({"title": "XOR", "runs": deeper}) is None
    assert rates_report.row({"title": "XOR", "runs": runs}) is None


def test_the_page_holds_the_best_learning_rates_of_the_stored_results():
    page = rates_report.PAGE.read_text()
    assert rates_report.fill(page, results.stored()) == page


def test_the_page_of_the_demo_says_what_is_stored_of_five_layers():
    result = json.loads((sweep_report.PAGE.parent / "experiments" / "relay_ladder_32.json").read_text())
    rules = results.groups(result["runs"])[("xor_count.depth", 5),]
    words = (sweep_report.PAGE.parent / "real_input.md").read_text().split("* **Deeper**")[1].split("\n\n")[0]
    for rule, named in (
        ("deep e-prop", "Deep e-prop"),
        ("BPTT", "BPTT"),
        ("hops = 1", "`hops=1`)"),
        ("lower frozen", "frozen"),
    ):
        mean = statistics.mean(results.final(rules[rule]))
        assert f"{named} {mean:.3f}" in words
