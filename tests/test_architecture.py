"""The rooms of the package: imports run downward, files and functions stay short, and the map names what exists."""

from __future__ import annotations

import re

import pytest

from tests.rooms import FLOORS, PACKAGE, ROOT, longest_chain, modules, room_imports

LONGEST_CHAIN = 12
"""Files; to be made shorter, never longer."""


def test_rooms_import_from_floors_below_alone():
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    assert {module.room for module in modules().values()} == {*floor, ""}
    for room, targets in room_imports().items():
        if room:
            above = {target for target in targets if floor[target] >= floor[room]}
            assert not above, f"{room} imports from {above}"


def test_files_and_functions_are_short():
    assert not {m.name: m.lines for m in modules().values() if m.lines > 400}
    long = {f"{m.name}.{f}": size for m in modules().values() for f, size in m.functions.items() if size > 60}
    assert not long
    assert len(longest_chain()) <= LONGEST_CHAIN


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__init__")])
def test_flax_is_imported_by_the_adapters_alone(name):
    text = (ROOT / PACKAGE / f"{name.replace('.', '/')}.py").read_text()
    if name.partition(".")[0] != "network":
        assert not re.search(r"^\s*(import|from) flax", text, re.MULTILINE)


def test_the_map_names_what_exists():
    """Each file that docs/architecture.md names is there, and each function or class beside it stands in it."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)+\w+\.py)`((?:, `\w+`)*)", page)
    assert {"4", "5", "6", "9", "10", "11"} <= set(re.findall(r"^\| (\d+),", page, re.MULTILINE))
    assert len(named) > 20
    for path, names in named:
        file = ROOT / path if path.startswith("tests/") else ROOT / PACKAGE / path
        text = file.read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b(def|class) {name}\b", text), f"{path} has no {name}"
