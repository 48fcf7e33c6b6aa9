"""The rooms of ``experiments``: each imports from rooms below it alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[3] / "experiments"
BELOW = {
    "program": (),
    "tasks": ("program",),
    "training": ("program", "tasks"),
    "sweeps": ("program", "tasks", "training"),
    "peers": (),
    "rl": ("program", "tasks"),
    "studies": ("program", "tasks", "training", "sweeps", "peers"),
    "benchmarks": ("program", "training", "peers"),
    "demo": ("program", "tasks", "training"),
    "distributed": ("program", "tasks"),
}
"""What a room may import from, besides itself."""


def imported(path: Path) -> set[str]:
    """The rooms that a file names in its imports, wherever these stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("experiments.")}


def test_every_file_has_a_room():
    assert {path.name for path in ROOM.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(BELOW)
    assert [path.name for path in ROOM.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_from_those_below_it_alone(room: str):
    seen = {path.name: imported(path) - {room, *BELOW[room]} for path in (ROOM / room).glob("*.py")}
    assert {name: rooms for name, rooms in seen.items() if rooms} == {}
