"""The program: what is done is not done again, what is stopped goes on, and the page has what was stored."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.rl import get_config
from experiments.program import pages
from experiments.rl import report, run
from experiments.rl.training import Record


@pytest.fixture
def trained(monkeypatch):
    """The rules that were trained, by records that are made up: ``records`` itself is tested with the agent."""
    seen = []

    def records(config, task, rule):
        seen.append((task.title, rule))
        for step in range(task.report_every, task.steps + 1, task.report_every):
            if seen[-1][1] == "stopped":
                raise KeyboardInterrupt
            level = {"exact RTRL": 0.95, "deep e-prop": 0.92}.get(rule, 0.1) * min(1, 2 * step / task.steps)
            returned = np.array([level, level + 0.02, np.nan if step == task.report_every else level])
            yield Record(step, returned, np.array([4, 4, 0 if step == task.report_every else 2]), np.full(3, 0.5))

    monkeypatch.setattr(run, "records", records)
    monkeypatch.setattr(run, "commit", lambda: "aaa")
    return seen


def config_of(*rules):
    config = get_config()
    config.rules, config.seeds = rules, (0, 1, 2)
    return config


def test_what_is_done_is_not_done_again(trained, tmp_path, capsys):
    arguments = ["chain_8", "--results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert run.main(arguments, config_of("deep e-prop", "stopped")) == 130
    assert "goes on" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "chain_8.json").read_text())
    assert [one["rule"] for one in result["runs"]] == ["deep e-prop"] and result["missing"] == ["stopped"]
    assert "Not run yet: stopped." in report.markdown(result)
    config = config_of("deep e-prop", "TBPTT(1)")
    assert run.main(arguments, config) == 0
    assert [rule for _, rule in trained] == ["deep e-prop", "stopped", "TBPTT(1)"]
    result = json.loads((tmp_path / "out" / "chain_8.json").read_text())
    assert [one["rule"] for one in result["runs"]] == ["deep e-prop", "TBPTT(1)"] and result["commit"] == "aaa"
    assert result["runs"][0]["return"][0][2] is None and result["best"] == 1
    config.learning_rate = 0.5  # other numbers: all is run again
    assert run.main(arguments, config) == 0
    assert [rule for _, rule in trained][3:] == ["deep e-prop", "TBPTT(1)"]


def test_one_rule_is_run_again_in_a_clone_without_the_others_curves(trained, tmp_path):
    """``out`` comes with the repository, ``results`` does not: what stands there of other rules is not lost."""
    config, out = config_of("exact RTRL", "deep e-prop", "TBPTT(1)"), str(tmp_path / "out")
    first = ["chain_8", "--results", str(tmp_path / "runs"), "--out", out, "--rule", "exact RTRL", "--rule", "TBPTT(1)"]
    assert run.main(first, config) == 0
    before = json.loads((tmp_path / "out" / "chain_8.json").read_text())
    elsewhere = ["chain_8", "--results", str(tmp_path / "none"), "--out", out]
    assert run.main([*elsewhere, "--rule", "deep e-prop"], config) == 0
    after = json.loads((tmp_path / "out" / "chain_8.json").read_text())
    assert [one["rule"] for one in after["runs"]] == list(config.rules) and not after["missing"]
    assert [after["runs"][i] for i in (0, 2)] == before["runs"] and before["missing"] == ["deep e-prop"]
    config.learning_rate = 0.5  # of other numbers nothing is kept
    assert run.main([*elsewhere, "--rule", "deep e-prop"], config) == 0
    after = json.loads((tmp_path / "out" / "chain_8.json").read_text())
    assert [one["rule"] for one in after["runs"]] == ["deep e-prop"] and len(after["missing"]) == 2


def test_what_is_not_there_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gymnax", None)
    folders = ["--results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert run.main(["gymnax_cart_pole", *folders]) == 2
    assert "pip install -e '.[rl]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["chain_9"])
    assert "Did you mean 'chain_8'?" in capsys.readouterr().err
    assert run.main([*folders, "--rule", "deep e-prop"]) == 0  # all that can be run
    assert len(trained) == len(get_config().tasks) - 1


def test_the_page_has_the_table_of_what_was_stored(trained, tmp_path):
    config = config_of("exact RTRL", "deep e-prop", "TBPTT(1)")
    assert run.main(["chain_8", "--results", str(tmp_path / "runs"), "--out", str(tmp_path)], config) == 0
    page = pages.add(pages.add("# Page\n", "rl chain_8", "A", "x"), "rl chain_32", "B", "x")
    filled = report.fill(page, tmp_path)
    rows = [line.split(" | ") for line in filled.splitlines() if line.startswith("| ")]
    assert rows[0] == ["| rule", "return at the end", "lowest to highest seed", "seeds at 0.9", "steps to 0.9 |"]
    assert rows[1][:4] == ["| exact RTRL", "0.96 ± 0.01", "0.95 to 0.97", "3 of 3"]
    assert rows[2][1:4] == ["0.93 ± 0.01", "0.92 to 0.94", "3 of 3"]
    assert rows[3][1:] == ["0.11 ± 0.01", "0.10 to 0.12", "0 of 3", f"> {config.tasks.chain_8.steps:,} |"]
    # The mean of five records, of which the first is at step 2000 and the level is reached at half time.
    assert float(rows[1][4].strip(" |").replace(",", "")) == pytest.approx(46_000, abs=4_000)
    assert "Not run yet: `python -m experiments.rl chain_32`." in filled
    report.draw(json.loads((tmp_path / "chain_8.json").read_text()), tmp_path / "chain_8.png")
    assert (tmp_path / "chain_8.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_stored_results():
    page = report.PAGE.read_text()
    assert report.fill(page, report.FOLDER) == page
    assert {path.stem for path in report.FOLDER.glob("*.json")} <= set(pages.names(page, report.KIND))
