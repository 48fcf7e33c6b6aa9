"""README.md: its code runs as printed, its tables are those that were measured, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.demo import readme

pytestmark = pytest.mark.as_users

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# The blocks share one namespace, in order; a block keeps its place in the README, so that a traceback names the line.
RUN_BLOCKS = """
import pathlib, re, sys
page = sys.argv[1]
text = pathlib.Path(page).read_text()
namespace = {"__name__": "__main__"}
fences = re.finditer(r"^```(?:python|\\{code-cell\\})\\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
for number, block in enumerate(fences):
    lines_above = text[: block.start(1)].count("\\n")
    exec(compile("\\n" * lines_above + block[1], page, "exec"), namespace)
print("blocks:", number + 1)
"""


@pytest.fixture(scope="module")
def output() -> str:
    """What all python blocks print in a fresh interpreter with JAX's own defaults."""
    return run_blocks("README.md")


def run_blocks(page: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "0", "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", RUN_BLOCKS, page]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_page_of_the_projected_carry_runs() -> None:
    output = run_blocks("docs/projected.md")
    assert "Error(total=" in output and "blocks: 1" in output


def test_the_page_for_neuroscientists_runs() -> None:
    """Its losses are NEST's."""
    output = run_blocks("docs/neuroscience.md")
    pairs = re.findall(r"^([\d.]+)   NEST ([\d.]+)$", output, re.MULTILINE)
    assert len(pairs) == 5
    assert all(abs(float(seen) / float(nest) - 1) < 1e-12 for seen, nest in pairs)
    assert "{'0': (8, 12, 20)}" in output and "0_recurrent" in output and "blocks: 5" in output


def test_the_page_of_the_rules_runs() -> None:
    output = run_blocks("docs/rules.md")
    assert "loss " in output and "blocks: 1" in output


def test_the_page_of_streams_runs() -> None:
    """Updates by steps and by chunks are the same."""
    output = run_blocks("docs/streams.md")
    assert "blocks: 5" in output


NOTEBOOKS = [path for path in (ROOT / "docs").rglob("*.md") if "\n```{code-cell}\n" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in sorted(NOTEBOOKS)])
def test_the_notebooks_of_the_site_run(page: str) -> None:
    """`make docs` runs them too, and shows what they print."""
    if "haiku" in page:
        pytest.importorskip("haiku"), pytest.importorskip("equinox")
    assert "blocks: " in run_blocks(page)


@pytest.mark.slow
def test_the_overview_of_the_api_runs() -> None:
    output = run_blocks("docs/api_overview.md")
    assert f"blocks: {(ROOT / 'docs/api_overview.md').read_text().count('```{code-cell}')}" in output
    assert "recurrence" in output and "relative error" in output


def test_the_example_learns(output: str) -> None:
    """As README says: from a guess's loss, and share, of eight classes."""
    assert f"blocks: {README.count('```python')}" in output
    printed = re.findall(r"^batch (\d+): loss per step (\S+), accuracy (\S+)$", output, re.MULTILINE)
    said = README.split("It prints", 1)[1]
    for column in (1, 2):
        ends = [f"{float(line[column]):.1f}" for line in (printed[0], printed[-1])]
        assert " to ".join(ends) in said.split("\n\n", 1)[0], ends


def test_the_example_is_short() -> None:
    first = README.split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


def test_it_is_read_in_ten_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_tables_are_the_measured_ones() -> None:
    """What is learnt as docs/demo.md has it; times as docs/performance.md has them."""
    assert readme.insert(README, (ROOT / "docs" / "demo.md").read_text()) == README
    for section, page, least in (("What it costs", "performance", 12), ("Compared with others", "peers", 20)):
        rows = [line for line in README.split(f"## {section}", 1)[1].split("\n## ")[0].splitlines() if line[0:1] == "|"]
        figures = re.findall(r"(?<=\| )[\d.e-]+(?= )", "\n".join(rows))
        measured = (ROOT / "docs" / f"{page}.md").read_text()
        assert len(figures) > least
        assert [f for f in figures if f != "1.00" and not re.search(rf"(?<=[| ]){re.escape(f)}(?= )", measured)] == []


def test_the_returns_of_online_learning_are_the_stored_ones() -> None:
    stored = json.loads((ROOT / "docs" / "rl" / "chain_32.json").read_text())
    table = (ROOT / "docs" / "rl.md").read_text().split("### N = 32")[1].split("### ")[0]
    assert stored and "*Online reinforcement learning*" in README
    said = re.findall(r"\d\.\d\d", README.split("*Online reinforcement learning*")[1].split("\n\n")[0])
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    for figure, rule in zip(said, ("deep e-prop", "TBPTT(1)", "feed-forward"), strict=True):
        assert f"| {figure} ±" in rows[rule]
    assert "5 of 5" in rows["deep e-prop"]


def test_links_and_pictures_lead_somewhere() -> None:
    local = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert "docs/demo.png" in local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_speeds_are_those_that_were_measured():
    """The ratios to BPTT in docs/modes.md stand in docs/benchmarks, to the last digit printed."""

    def ratio(cell: str, features: int, rival: str, suite: str = "acceptance", batch: int = 16) -> str:
        stored = json.loads((ROOT / f"docs/benchmarks/{suite}.json").read_text())
        wanted = {"cell": cell, "features": features, "batch": batch}
        (rivals,) = [c["rivals"] for c in stored["comparisons"] if wanted.items() <= c["problem"].items()]
        times = {name: statistics.median(rivals[name][stored["machine"]["clock"]]) for name in (rival, "BPTT")}
        return f"{times[rival] / times['BPTT']:.2f}"

    text = " ".join((ROOT / "docs" / "modes.md").read_text().split())
    cells = {"tanh": "leaky tanh", "GRU": "GRU", "LSTM": "LSTM", "LRU": "LRU", "ALIF": "ALIF"}
    said = [f"{ratio(cell, 128, 'hops=0')} ({name})" for name, cell in cells.items()]
    assert f"segments take {', '.join(said[:-1])} and {said[-1]} times the time" in text
    small, large = (
        [ratio(cell, 128, "hops=0", "gpu") for cell in ("leaky tanh", "GRU")],
        ratio("GRU", 512, "hops=0", "gpu", 64),
    )
    assert (
        f"segments take {small[0]} (tanh) and {small[1]} (GRU) times the time of BPTT at these sizes, and {large}"
        in text
    )
    cases = (("leaky tanh", 128, 16), ("GRU", 128, 16), ("GRU", 512, 64))
    hoisted = [ratio(cell, features, "BPTT, hoisted", "gpu", batch) for cell, features, batch in cases]
    assert f"hoisted BPTT takes {hoisted[0]}, {hoisted[1]} and {hoisted[2]} (`make bench SUITE=gpu`)" in text
