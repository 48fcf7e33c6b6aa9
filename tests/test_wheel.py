"""What is released: sdist and wheel build, hold what they must, and import where only the requirements can be found."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.installed import ROOT, build, run, user_environment

pytestmark = pytest.mark.as_users

IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, sys
import deepeprop_jax
assert deepeprop_jax.__file__.startswith(sys.prefix), deepeprop_jax.__file__
for module in pkgutil.walk_packages(deepeprop_jax.__path__, "deepeprop_jax."):
    importlib.import_module(module.name)
for name in deepeprop_jax.__all__:
    getattr(deepeprop_jax, name)
for extra in ("sklearn", "matplotlib", "ml_collections", "nir", "pytest"):
    assert importlib.util.find_spec(extra) is None, extra
print("imported", len(deepeprop_jax.__all__))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel that is built of it."""
    sdist, wheel = sorted(build(ROOT, tmp_path_factory.mktemp("dist")), key=lambda path: path.suffix)
    assert (sdist.suffix, wheel.suffix) == (".gz", ".whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def user_python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, empty environment with the wheel."""
    return user_environment(built[1], tmp_path_factory.mktemp("user") / "empty")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = contents(built[1])
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "deepeprop_jax").rglob("*.py")}
    assert modules | {"deepeprop_jax/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepeprop_jax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_its_make_targets_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("deepeprop_jax", "tests", "experiments", "configs")
    sources = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    tops = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"}
    assert sources | pages | tops <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "results", "dist"))]


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_sources(built: tuple[Path, Path], tmp_path: Path) -> None:
    (direct,) = build(ROOT, tmp_path, "--wheel")
    assert direct.name == built[1].name and contents(direct) == contents(built[1])


def test_the_wheel_imports_without_the_extras(user_python: Path) -> None:
    assert "imported" in run(user_python, "-I", "-c", IMPORT_EVERYTHING)


@pytest.mark.slow
def test_the_first_example_runs_where_the_wheel_alone_is(user_python: Path, tmp_path: Path) -> None:
    first = (ROOT / "README.md").read_text().split("```python\n", 1)[1].split("```", 1)[0]
    printed = run(user_python, "-I", "-c", first + "\nprint('loss is', float(loss))", cwd=tmp_path)
    assert float(printed.rpartition("loss is ")[2]) > 0


def test_version_changelog_and_citation_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_the_citation_has_the_fields_of_its_format() -> None:
    """Those that version 1.2.0 of the Citation File Format requires, of the kinds that it allows."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert set(citation) <= {
        *("cff-version", "message", "title", "authors", "type", "version", "license", "references", "abstract"),
        *("keywords", "url", "repository-code", "date-released", "doi", "identifiers", "preferred-citation"),
    }
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", project["license"])
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
        assert reference["type"] in {"article", "conference-paper", "generic", "software"}
    for work in (citation, *citation["references"]):
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
            assert all(isinstance(value, str) for value in author.values())
