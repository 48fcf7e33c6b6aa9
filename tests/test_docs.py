"""The Markdown files: every link leads somewhere, claims are short and stand on their logs, logs are written whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.program import pages

ROOT = Path(__file__).parents[1]
DOCS = [*ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
CLAIMS, FILE = 250, 400
"""Lines at most, of a page of claims and of any other file (CONTRIBUTING.md)."""
SETTINGS = ("L", "batch", "rival")
"""Columns of a claim's table that are no figures."""


def without_code(text: str) -> str:
    """Markdown without its code, where brackets are no links and # is no heading."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """Those of a file's headings, as GitHub makes them; the second of two equal ones ends in -1."""
    found: set[str] = set()
    fenced = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.+?) *$", fenced, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one) is not None for one in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def lost(path: Path) -> list[str]:
    """The links of a file that lead nowhere: to no file of the repository, or to no heading of it."""
    found = []
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", without_code(path.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert lost(path) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Two words, one comma\n\n## `code` (twice)\n\n## `code` (twice)\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#two-words-one-comma) [c](other.md#code-twice-1) `[d](no.md)`\n"
        "[e](none.md) [f](other.md#three) [g](#here) [h](https://example.org/no)\n"
    )
    assert lost(page) == ["none.md", "other.md#three", "#here"]


def test_names_of_files_in_sources_are_those_of_files() -> None:
    sources = [path for folder in ("deepeprop_jax", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {
        (path.name, name)
        for path in [*sources, ROOT / "Makefile"]
        for name in re.findall(r"docs/[\w/]+\.(?:md|json|png)\b", path.read_text())
    }
    assert {where for where in named if not (ROOT / where[1]).exists()} == set()


@pytest.mark.parametrize("name", ["experiments", "performance"])
def test_claims_are_short_and_every_log_is_linked(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    assert len(page.read_text().splitlines()) <= CLAIMS
    logs = sorted((ROOT / "docs" / "logs" / name).glob("*.md"))
    index = (ROOT / "docs" / "logs" / name / "README.md").read_text()
    for log in logs:
        assert len(log.read_text().splitlines()) <= FILE
        assert log.name == "README.md" or f"({log.name})" in index
        assert f"(logs/{name}/{log.name})" in page.read_text()


def cells(row: str) -> list[str]:
    """Those of a table's row."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def not_in_logs(section: str, folder: Path) -> list[str]:
    """The figures of a section's tables that stand in no row of the logs that the section links to.

    A row is looked for by its name, in its first or second cell: that of the figure's row or column. Of a log's cell
    "median (minimum)" the median counts too.
    """
    logs = "".join((folder / log).read_text() for log in sorted(set(re.findall(r"\]\((logs/[^)#]+)\)", section))))
    rows = [cells(line) for line in logs.splitlines() if line.startswith("|")]
    strange = []
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *body = map(cells, table.splitlines())
        for row in body:
            for column, cell in zip(head[1:], row[1:], strict=True):
                if column in SETTINGS or not re.search(r"\d", cell):
                    continue
                named = {row[0], row[1], column, column.split(", ")[0], *re.split(r", | \(", row[0])} - {cell}
                found = {one for r in rows if named & set(r[:2]) for one in r}
                if cell not in found | {one.split(" (")[0] for one in found}:
                    strange.append(f"{row[0]}, {column}: {cell}")
    return strange


@pytest.mark.parametrize("name", ["experiments", "performance"])
def test_the_figures_of_claims_stand_in_their_logs(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    claims = re.split(r"^(?=## \d+\. )", page, flags=re.MULTILINE)[1:]
    assert len(claims) > 10
    for claim in claims:
        title = claim.splitlines()[0]
        assert "* Limits: " in claim and "* Again: `" in claim and "(logs/" in claim and "\n|---" in claim, title
        assert not_in_logs(claim, ROOT / "docs") == [], title


def test_a_figure_that_no_log_has_is_seen(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.md").write_text("| rule | time |\n|---|---:|\n| BPTT | 1.25 (1.00) |\n| other | 2.50 |\n")
    table = "| rule | time |\n|---|---:|\n| BPTT | 1.25 |\n| BPTT | 2.50 |\n| none | 1.25 |\n"
    assert not_in_logs(f"{table}[Log](logs/a.md)", tmp_path) == ["BPTT, time: 2.50", "none, time: 1.25"]
    assert not_in_logs("| task | BPTT |\n|---|---:|\n| x | 1.25 |\n[Log](logs/a.md)", tmp_path) == []


def test_a_log_is_written_as_it_was_read(tmp_path: Path) -> None:
    log = pages.Log(tmp_path, "some")
    log.folder.mkdir(parents=True)
    texts = {"a.md": "# A\n", "README.md": "# First in no order\n", "b.md": "<!-- x y: note -->\n<!-- end of x y -->\n"}
    for name, text in texts.items():
        (log.folder / name).write_text(text)
    page = log.read_text()
    log.write_text(page)
    assert {path.name: path.read_text() for path in log.files()} == texts
    log.write_text(pages.add(pages.fill(page, "x y", "filled"), "x z", "Z", "python"))
    assert "filled" in (log.folder / "b.md").read_text()
    assert (log.folder / "a.md").read_text() == "# A\n"
    assert (log.folder / "README.md").read_text().endswith("<!-- end of x z -->\n")
