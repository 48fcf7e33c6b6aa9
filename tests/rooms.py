"""The rooms of the package, read from its syntax trees: who imports whom, how long files and functions are.

python -m tests.rooms            a table
python -m tests.rooms --draw     docs/architecture.png as well
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "deepeprop_jax"
FLOORS = (
    ("network", "jaxpr", "losses"),
    ("reference", "analysis", "cells"),
    ("traces",),
    ("segments",),
    ("learner",),
    ("rules", "report", "streams", "export"),
)
"""Rooms from the lowest floor up: a room imports from those below it, and from itself."""


class Module(NamedTuple):
    """One file.

    Attributes:
      name: dotted, without the package's.
      lines: of the file.
      imports: names of the modules of the package that it imports.
      functions: per function, its lines of code: neither blank, nor docstring, nor comment.
    """

    name: str
    lines: int
    imports: frozenset[str]
    functions: dict[str, int]

    @property
    def room(self) -> str:
        """The folder that it stands in; "" for the package's own ``__init__``."""
        return self.name.partition(".")[0] if "." in self.name else ""


@functools.lru_cache
def modules() -> dict[str, Module]:
    """All files of the package."""
    paths = {_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    return {name: _read(name, path, set(paths)) for name, path in paths.items()}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


def _read(name: str, path: Path, known: set[str]) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = (node.module or "")[len(PACKAGE) + 1 :]
            for alias in node.names:
                candidates = (f"{module}.{alias.name}".strip("."), module, f"{module}.__init__")
                imports.add(next(found for found in candidates if found in known))
    code = _code_lines(text)
    functions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) & code
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
            functions[node.name] = len(lines)
    return Module(name, len(text.splitlines()), frozenset(imports - {name}), functions)


def _code_lines(text: str) -> set[int]:
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines


def longest_chain() -> list[str]:
    """The longest chain of files, each of which imports the next."""
    found = modules()

    @functools.cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max((chain(other) for other in found[name].imports), key=len, default=()))

    return list(max((chain(name) for name in found), key=len))


def room_imports() -> dict[str, set[str]]:
    """Per room, the rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for module in modules().values():
        targets = {modules()[name].room for name in module.imports}
        found.setdefault(module.room, set()).update(targets - {module.room})
    return found


def draw(path: Path) -> None:
    """The rooms, floor by floor, with an arrow to every room that one imports from."""
    import matplotlib.pyplot as plt  # an extra: not for those who only test

    counts = {room: [m for m in modules().values() if m.room == room] for floor in FLOORS for room in floor}
    figure, axes = plt.subplots(figsize=(8, 6))
    places = {}
    for height, floor in enumerate(FLOORS):
        for i, room in enumerate(floor):
            x = (i + 1) / (len(floor) + 1)
            places[room] = x, height
            held = counts[room]
            text = f"{room}\n{len(held)} files, {sum(m.lines for m in held)} lines"
            axes.text(x, height, text, ha="center", va="center", bbox={"boxstyle": "round", "fc": "white"}, zorder=3)
    for room, targets in room_imports().items():
        for target in targets & set(places) if room else ():
            arrow = {"arrowstyle": "->", "color": "0.6", "shrinkA": 18, "shrinkB": 18}
            axes.annotate("", places[target], places[room], arrowprops=arrow, zorder=1)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(FLOORS) - 0.5))
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="write docs/architecture.png")
    drawn = parser.parse_args().draw
    found = modules().values()
    chain = longest_chain()
    long_functions = sorted(((size, m.name, f) for m in found for f, size in m.functions.items()), reverse=True)[:5]
    print(f"files {len(found)}, lines {sum(m.lines for m in found)}, floors {len(FLOORS) + 1} with the package itself")
    for floor in FLOORS:
        for room in floor:
            held = [m for m in found if m.room == room]
            below = ", ".join(sorted(room_imports()[room])) or "-"
            print(f"  {room:10} {len(held):3} files {sum(m.lines for m in held):6} lines  imports {below}")
    print(f"longest chain of files: {len(chain)}: {' > '.join(chain)}")
    print("longest file:", *max((m.lines, m.name) for m in found))
    print("longest functions, lines of code:", *(f"{name}.{f} {size}" for size, name, f in long_functions), sep="\n  ")
    if drawn:
        draw(ROOT / "docs" / "architecture.png")


if __name__ == "__main__":
    main()
