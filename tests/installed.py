"""The package as a user has it: built, and installed where only its declared requirements can be found."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; an AssertionError with all of it where it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(source: Path, out: Path, *kinds: str) -> list[Path]:
    """What ``python -m build`` makes of a source tree: without kinds an sdist, and a wheel of that sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, source)
    return sorted(out.iterdir())


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


def user_environment(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment, into which the wheel is installed beside links to what it requires."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
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
    return python
