"""The documentation site, without building it: no page is lost, and no public name is missing from the reference."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = [f"deepeprop_jax{room}" for room in ("", ".learner", ".cells", ".losses", ".export", ".rules", ".reference")]
DIRECTIVES = r"^\.\. auto(?:function|class|data):: (\S+)$"


def excluded() -> list[str]:
    """What conf.py leaves out of the site."""
    for statement in ast.parse((DOCS / "conf.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "exclude_patterns":
            return ast.literal_eval(statement.value)
    raise AssertionError("conf.py has no exclude_patterns")


def pages(docs: Path, without: list[str]) -> set[str]:
    """The site's pages, by their names without .md."""
    found = (path.relative_to(docs) for path in docs.rglob("*.md"))
    return {str(p.with_suffix("")) for p in found if not {str(p), *map(str, p.parents)} & set(without)}


def reached(docs: Path, known: set[str]) -> set[str]:
    """The pages that toctrees lead to, from index on.

    Raises:
      AssertionError: a toctree names a page that is not there.
    """
    found, waiting = set(), ["index"]
    while waiting:
        page = waiting.pop()
        assert page in known, f"a toctree names {page}, and docs/{page}.md is no page"
        if page in found:
            continue
        found.add(page)
        text = (docs / f"{page}.md").read_text()
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for entry in (line for line in tree.splitlines() if line and not line.startswith(":")):
                name = re.sub(r"^.*<(.*)>$", r"\1", entry)
                name = name[1:] if name.startswith("/") else str(Path(page).parent / name)
                waiting += fnmatch.filter(known, name) if ":glob:" in tree else [name]
    return found


def test_every_page_is_in_a_toctree() -> None:
    known = pages(DOCS, excluded())
    assert len(known) > 50
    assert known - reached(DOCS, known) == set()


def test_a_page_in_no_toctree_is_seen(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.md").write_text("# A\n\n```{toctree}\n:hidden:\n\nsub/b\nA title <c>\n```\n")
    for name in ("sub/b", "c", "lost", "left"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n")
    known = pages(tmp_path, ["left.md"])
    assert known - reached(tmp_path, known) == {"lost"}
    (tmp_path / "c.md").write_text("```{toctree}\nnone\n```\n")
    with pytest.raises(AssertionError, match="none"):
        reached(tmp_path, known)


def test_pages_link_to_pages_of_the_site_and_include_what_is_there() -> None:
    known = pages(DOCS, excluded())
    lost = []
    for page in known:
        path = DOCS / f"{page}.md"
        text = path.read_text()
        lost += [(page, one) for one in re.findall(r"\{include\} (\S+)", text) if not (path.parent / one).exists()]
        for target in re.findall(r"\]\(([^)#:\s]+\.md)(?:#[^)]*)?\)", text):
            file = (path.parent / target).resolve()
            if file.is_relative_to(DOCS) and str(file.relative_to(DOCS).with_suffix("")) not in known:
                lost.append((page, target))
    assert lost == []


def test_every_public_name_stands_in_the_reference() -> None:
    written = re.findall(DIRECTIVES, "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.MULTILINE)
    assert len(written) == len(set(written))
    documented = []
    for name in written:
        module, _, attribute = name.rpartition(".")
        documented.append(getattr(importlib.import_module(module), attribute))
    missing = []
    for name in MODULES:
        module = importlib.import_module(name)
        missing += [
            f"{name}.{one}" for one in module.__all__ if not any(getattr(module, one) is other for other in documented)
        ]
    assert missing == []


def test_notebooks_are_pages_that_run_and_others_have_no_cells() -> None:
    """A page with cells has the head that makes Sphinx run them."""
    for path in DOCS.rglob("*.md"):
        text = path.read_text()
        assert text.startswith("---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n") == (
            "```{code-cell}" in text
        ), path


def test_the_errors_of_modes_are_the_measured_ones() -> None:
    """The table of docs/modes.md, as `python -m experiments.studies.fidelity_modes` stored it."""
    rows: dict[str, list[dict]] = {}
    for row in json.loads((DOCS / "fidelity" / "modes.json").read_text())["rows"]:
        rows.setdefault(row["mode"], []).append(row)
    page = (DOCS / "modes.md").read_text().replace("`", "")
    assert len(rows) == 4
    for mode, (tanh, gru) in rows.items():
        assert (tanh["cell"], gru["cell"]) == ("SimpleCell", "GRUCell")
        cells = [f"{tanh[layer]:.2g}; {gru[layer]:.2g}" for layer in ("lower", "upper")]
        assert f"| {mode} | tanh; GRU | {cells[0]} | {cells[1]} |" in page
