"""Types as a user meets them: the code of README and docs under mypy and pyright, and every public name with a type.

`make types` installs basedpyright, a pyright that pip can install, and runs this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installed import ROOT, build, user_environment

pytestmark = pytest.mark.slow

PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]
"""Those whose code tests/test_readme.py runs."""
PUBLIC = ("", ".cells", ".export", ".learner", ".losses", ".reference", ".rules")
MYPY = "[mypy]\n[mypy-optax.*]\nignore_missing_imports = True\n"
"""optax has no types of its own."""
STRICT = ("--strict", "--allow-untyped-defs", "--allow-untyped-calls")
"""The pages' own functions have no annotations; what they call is checked."""

needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed: make types"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of an environment with the wheel and what it requires."""
    (wheel,) = build(ROOT, tmp_path_factory.mktemp("dist"), "--wheel")
    return user_environment(wheel, tmp_path_factory.mktemp("user") / "empty")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the code of each page as a file."""
    folder = tmp_path_factory.mktemp("code")
    for page in PAGES:
        code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
        (folder / f"{page.stem.lower()}.py").write_text(code)
    (folder / "mypy.ini").write_text(MYPY)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    return folder


def mypy(python: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    files = sorted(path.name for path in folder.glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), *options, *files]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def pyright(python: Path, folder: Path, *options: str) -> dict:
    """What it says, as JSON, with the environment of this Python."""
    environment = {**os.environ, "VIRTUAL_ENV": str(python.parents[1]), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "basedpyright", "--outputjson", *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize("options", [(), STRICT], ids=["default", "strict"])
def test_the_code_of_the_pages_passes_mypy(python: Path, folder: Path, options: tuple[str, ...]) -> None:
    result = mypy(python, folder, *options)
    assert f"no issues found in {len(PAGES)} source files" in result.stdout, result.stdout


def test_mypy_sees_the_types(python: Path, tmp_path: Path) -> None:
    """So that it can fail."""
    (tmp_path / "wrong.py").write_text(
        "import flax.linen as nn\nfrom deepeprop_jax import deep_eprop\n\n"
        "learner = deep_eprop(nn.Dense(2), hops='all')\n"
        "state: int = learner.init((), (), 1.0)\nlearner.value_and_grad(3, segment_lenght=2)\n"
    )
    found = re.findall(r"wrong.py:(\d+): error: .*\[([a-z-]+)\]", mypy(python, tmp_path).stdout)
    assert {(line, kind) for line, kind in found} >= {("4", "arg-type"), ("5", "assignment"), ("6", "call-arg")}


@needs_pyright
def test_the_code_of_the_pages_passes_pyright(python: Path, folder: Path) -> None:
    said = pyright(python, folder, "--pythonpath", str(python))
    assert said["summary"]["filesAnalyzed"] == len(PAGES)
    assert [problem for problem in said["generalDiagnostics"] if problem["severity"] != "information"] == []


@needs_pyright
def test_every_public_name_has_a_type(python: Path, tmp_path: Path) -> None:
    said = pyright(python, tmp_path, "--ignoreexternal", "--verifytypes", "deepeprop_jax")["typeCompleteness"]
    known = {s["name"]: s["isTypeKnown"] and not s["isTypeAmbiguous"] for s in said["symbols"]}
    names = {
        f"deepeprop_jax{module}.{name}"
        for module in PUBLIC
        for name in importlib.import_module(f"deepeprop_jax{module}").__all__
    }
    assert names <= set(known)
    assert {name for name in names if not known[name]} == set()
