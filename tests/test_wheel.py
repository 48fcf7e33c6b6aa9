"""The wheel: it builds, holds the package alone, and imports where only its declared requirements can be found."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.as_users

ROOT = Path(__file__).parents[1]

IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, sys
import deepeprop_jax
assert deepeprop_jax.__file__.startswith(sys.prefix), deepeprop_jax.__file__
for module in pkgutil.walk_packages(deepeprop_jax.__path__, "deepeprop_jax."):
    importlib.import_module(module.name)
for name in deepeprop_jax.__all__:
    getattr(deepeprop_jax, name)
for extra in ("sklearn", "matplotlib", "ml_collections", "pytest"):
    assert importlib.util.find_spec(extra) is None, extra
print("imported", len(deepeprop_jax.__all__))
"""


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


def requirements(wheel: Path) -> list[Requirement]:
    """What an installer would fetch for the wheel itself: its requirements without those of the extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def closure(wanted: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions reached from ``wanted`` by their own metadata, as an installer resolves them."""
    found: dict[str, importlib.metadata.Distribution] = {}
    asked: set[tuple[str, str]] = set()
    queue = [(r.name, extra) for r in wanted for extra in ("", *r.extras)]
    while queue:
        name, extra = queue.pop()
        if (canonicalize_name(name), extra) in asked:
            continue
        asked.add((canonicalize_name(name), extra))
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                queue += [(needed.name, inner) for inner in ("", *needed.extras)]
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "deepeprop_jax").rglob("*.py")}
    assert modules <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepeprop_jax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_imports_without_the_extras(wheel: Path, tmp_path: Path) -> None:
    """A real, empty environment, into which links to the wheel's own requirements are laid, and the wheel by pip."""
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in closure(requirements(wheel)).values():
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", wheel)
    run(*pip, "check")
    assert "imported" in run(python, "-I", "-c", IMPORT_EVERYTHING)
