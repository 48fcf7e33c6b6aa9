"""Every program: its help does nothing, what it does not know is refused, what it compiles is kept; the pages."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from matplotlib.figure import Figure

from experiments.benchmarks import document
from experiments.demo import readme
from experiments.program import command, pages
from experiments.program.refusal import Refused, check_name
from experiments.studies import ablation
from experiments.studies import fidelity_untrained as fidelity_study
from experiments.sweeps import report as sweep_report
from experiments.sweeps import sweep

ROOT = Path(__file__).parents[3]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for room in (ROOT / "experiments", ROOT / "tests" / "fuzz")
    for path in room.rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
NOT_KEPT = (
    "benchmarks",
    "distributed.cost",
    "fuzz",
    "sweeps.report",
    "rl.report",
    "studies.cosine",
    "studies.rates",
    "studies.directions",
    "studies.eligibility",
    "readme",
    "draw_lattice",
)
"""They measure how long compiling takes, compile each program once and never again, or compile nothing."""

NEEDED = {
    "experiments.sweeps": ["text"],
    "experiments.training": ["--config=configs/text.py"],
    "experiments.training.write": ["folder"],
}
"""Arguments that must be there."""


@pytest.fixture
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file written, and any end of the process that tests cannot see, is a failure."""

    def refused(*arguments, **options):
        raise AssertionError(f"done: {arguments}")

    for thing, name in ((Path, "write_text"), (Path, "mkdir"), (Figure, "savefig"), (os, "_exit")):
        monkeypatch.setattr(thing, name, refused)


@pytest.fixture
def cache():
    """The setting of a process that nobody has set, put back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def status(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The exit status of a program, run as a user runs it."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(program, run_name="__main__")
    return end.value.code


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*")
@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_what_a_program_does_and_does_nothing(program, cache, monkeypatch, capsys):
    assert status(program, ["--help"], monkeypatch) == 0
    assert f"python -m {program}" in capsys.readouterr().out
    # What it compiles is kept, however it was started.
    assert cache() == (None if any(name in program for name in NOT_KEPT) else "results/compiled")
    monkeypatch.chdir(ROOT)
    assert status(program, [*NEEDED.get(program, []), "--hlep"], monkeypatch) == 2
    assert "hlep" in capsys.readouterr().err


def test_the_users_own_place_for_compiled_programs_wins(cache, tmp_path):
    for own in (str(tmp_path), ""):  # the second: nowhere
        jax.config.update("jax_compilation_cache_dir", own)
        command.keep_compiled()
        assert cache() == own


def test_a_typing_error_is_met_with_the_nearest_name(capsys):
    for arguments, words in (
        (["xorcount_30"], "No sweep is called 'xorcount_30'. Did you mean 'xor_count_30'?"),
        (["text", "--reslts=x"], "No option is called '--reslts'. Did you mean '--results'?"),
        (["text", "text_24"], "Seen 'text_24', one argument too many."),
    ):
        with pytest.raises(SystemExit, match="2"):
            sweep.main(arguments)
        assert words in capsys.readouterr().err
    with pytest.raises(Refused, match="Did you mean 'BPTT'"):
        check_name("rule", "bptt", ["BPTT", "hops = 0"])


STORED = {"title": "A new one", "commit": "0", "threshold": 0.9}
LAYERS = {"0": [{"cosine": 1.0, "norm_ratio": 1.0}]}
RUN = {"fields": {"rule": "BPTT", "seed": 0}, "batch": [0, 1], "test_accuracy": [0.5, 1.0], "layers": LAYERS}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page without sections, and the stored result of one sweep beside it."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "new-one.json").write_text(json.dumps({**STORED, "runs": [RUN]}))
    path = tmp_path / "page.md"
    path.write_text("# Page\n\nText by hand.\n")
    monkeypatch.setattr(sweep_report, "PAGE", path)
    return path


def test_a_new_sweep_gets_a_section_of_its_own(page: Path, capsys):
    assert sweep_report.main([]) == 0
    first = page.read_text()
    assert first.startswith("# Page\n\nText by hand.\n\n## A new one\n\n<!-- sweep new-one: ")
    assert "| BPTT | 1.000 ± 0.000 |" in first and first.endswith("<!-- end of sweep new-one -->\n")
    assert (page.parent / "experiments" / "new-one.png").exists()
    assert "new-one has a section now" in capsys.readouterr().out
    # Moved, with text around it, it is filled where it stands; with nothing between its markers, too.
    empty = "<!-- sweep new-one: note -->\n<!-- end of sweep new-one -->\n"
    page.write_text(f"{empty}\n# Page\n")
    assert sweep_report.main([]) == 0
    moved = page.read_text()
    assert moved.startswith("<!-- sweep new-one: note -->\n`python -m experiments.sweeps new-one`, commit 0")
    assert moved.endswith("-->\n\n# Page\n")
    assert moved.count("new-one -->") == 1 and "section now" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "half", ["<!-- sweep new-one: x -->", "<!-- sweep new-one -->", "<!-- end of sweep new-one -->"]
)
def test_half_a_section_is_refused_with_the_lines_that_make_it(page: Path, half: str, capsys):
    page.write_text(f"{half}\n")
    assert sweep_report.main([]) == 2
    error = capsys.readouterr().err
    assert repr(half) in error
    assert page.read_text() == f"{half}\n"
    page.write_text("\n".join(error.splitlines()[-2:]) + "\n")  # the remedy, as it stands there
    assert sweep_report.main([]) == 0
    assert "| BPTT |" in page.read_text()


def test_a_table_without_its_place_is_refused_not_dropped():
    stored = json.loads(ablation.STORED.read_text())
    with pytest.raises(Refused, match="<!-- ablation: note -->\n<!-- end of ablation -->"):
        ablation.fill("a page", stored)
    with pytest.raises(Refused, match=r"no section 'demo\.md'"):
        readme.insert("a page", (ROOT / "docs/demo.md").read_text())
    with pytest.raises(Refused, match=r"two tables with the rules BPTT, .*; seen \[\]"):
        readme.insert("a page", "table")
    assert pages.fill("<!-- a: x -->\n<!-- end of a -->", "a", r"\1\n") == "<!-- a: x -->\n\\1\\n\n<!-- end of a -->"


def test_a_new_suite_gets_a_section_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "markdown", lambda suite: suite["title"])
    (tmp_path / "short.json").write_text('{"title": "Times"}')
    filled = document.fill("# Page\n", tmp_path)
    assert filled.startswith("# Page\n\n## Times\n\n<!-- benchmark short: ") and "-->\nTimes\n<!-- end" in filled
    assert document.fill(filled, tmp_path) == filled


def test_a_report_without_figures_says_how_to_get_them(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        fidelity_study.main(["--report", "--out", str(tmp_path)])
    assert "Measure first" in capsys.readouterr().err


def test_an_ablation_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(ablation, "trained", lambda folder: (SimpleNamespace(task=None), None))
    monkeypatch.setattr(ablation, "accuracy", lambda *arguments: 1.0)
    assert len(ablation.measure(Path("nowhere"))["runs"]) == len(list(ablation.cases()))
    assert "networks" in capsys.readouterr().out
