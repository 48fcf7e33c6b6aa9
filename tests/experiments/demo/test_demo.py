"""The demo, made small: it trains, reports, draws, and leaves a readable table when it is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.demo import get_config
from experiments.demo import demo, readme
from experiments.demo.report import Result


@pytest.fixture
def small():
    """A minute's work cut to seconds: one seed, two calls of one update."""
    config = get_config()
    config.seeds = (0,)
    config.rules = ("deep e-prop",)
    for task in (config.digits, config.xor_count):
        task.features, task.batch, task.updates, task.updates_per_call = 3, 2, 2, 1
    return config


@pytest.mark.mixed_promotion
def test_the_demo_runs_from_end_to_end(small, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--out", str(tmp_path)], small) == 0
    table = (tmp_path / "demo.md").read_text()
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| deep e-prop")]
    assert len(rows) == 2
    assert all(cell.strip() for row in rows for cell in row)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "deep e-prop" in capsys.readouterr().out


def test_ctrl_c_leaves_the_tables_as_far_as_known(small, tmp_path, capsys, monkeypatch) -> None:
    def interrupted(self: demo.Demo, progress) -> None:
        for results in self.results.values():
            results["deep e-prop"] = Result(trace_bytes=123)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Demo, "run", interrupted)
    assert demo.main(["--out", str(tmp_path)], small) == 130
    output = capsys.readouterr().out
    assert "Interrupted" in output and output.count("123") == 2
    assert not list(tmp_path.iterdir())


def test_the_readme_takes_the_tables_between_its_markers() -> None:
    """Their accuracies, and the time on the first task, by names that need no explanation."""
    tables = (readme.ROOT / "docs" / "demo.md").read_text()
    filled = readme.insert("a\n<!-- demo.md: note -->\nold\n<!-- end of demo.md -->\nb", tables)
    assert filled.startswith("a\n<!-- demo.md: note -->\n| rule |") and filled.endswith("|\n<!-- end of demo.md -->\nb")
    (row,) = [line for line in filled.splitlines() if line.startswith("| `hops=0` |")]
    first, second = [line.split(" | ") for line in tables.splitlines() if line.startswith("| hops = 0 |")]
    assert row.strip("| ").split(" | ")[2:] == [first[1], second[1], first[5]]
    with pytest.raises(ValueError, match="no section"):
        readme.insert("a", tables)
