"""The record of a suite as a table: for the terminal, and in Markdown."""

from __future__ import annotations

import math
import statistics
from typing import Any

from rich import box
from rich.table import Table

from experiments.benchmarks.measure import HOISTED, REFERENCE
from experiments.program import pages

HEADER = (
    "rival",
    "{clock} µs per step",
    "wall µs per step",
    "× BPTT",
    "× hoisted",
    "error to {reference}, bottom layer to top",
    "compile, s",
    "temporary",
    "state",
    "machine's limit, µs",
)


def ratio(entry: dict[str, Any], reference: dict[str, Any] | None, clock: str) -> tuple[float, float] | None:
    """Median over median, and minimum over minimum; None where either is not timed."""
    if reference is None or not entry.get(clock) or not reference.get(clock):
        return None
    ours, theirs = entry[clock], reference[clock]
    return statistics.median(ours) / statistics.median(theirs), min(ours) / min(theirs)


def limit_microseconds(entry: dict[str, Any], machine: dict[str, Any]) -> float | None:
    """Per step, at the rates of large matrix products and of memory that were measured in the same run."""
    if "multiply_adds" not in entry:
        return None
    gemm = max(machine["gemm"].values())
    return 1e6 * max(entry["multiply_adds"] / gemm, entry["bytes"] / machine["bandwidth"])


def rows(record: dict[str, Any], machine: dict[str, Any]) -> list[list[str]]:
    """One row for each rival of a comparison, in the order of ``HEADER``."""
    rivals, clock = record["rivals"], machine["clock"]
    found = []
    for name, entry in rivals.items():
        if "missing" in entry:
            found.append([f"{name} ({entry['missing']})", *[""] * (len(HEADER) - 1)])
            continue
        steps = record["problem"]["steps"]
        limit = limit_microseconds(entry, machine)
        found.append(
            [
                name,
                _per_step(entry.get(clock), steps),
                _per_step(entry.get("wall"), steps),
                _pair(ratio(entry, rivals.get(REFERENCE), clock)),
                _pair(ratio(entry, rivals.get(HOISTED), clock)),
                " ".join(_error(error) for error in entry.get("errors", ())),
                f"{statistics.median(entry['compile_cpu']):.1f}" if "compile_cpu" in entry else "",
                _bytes(entry.get("temporary_bytes")),
                _bytes(entry.get("state_bytes")),
                "" if limit is None else f"{limit:.1f}",
            ]
        )
    return found


def _header(machine: dict[str, Any], reference: str) -> list[str]:
    clock = "CPU" if machine["clock"] == "cpu" else "device"
    return [title.format(clock=clock, reference=reference) for title in HEADER]


def machine_line(machine: dict[str, Any]) -> str:
    """What the times are of."""
    products = ", ".join(f"{size} {rate / 1e9:.1f}" for size, rate in machine["gemm"].items())
    return (
        f"{machine['processor']}, {machine['device']}, {machine['threads']} thread(s), JAX {machine['jax']}, Python "
        f"{machine['python']}; float32 matrix products, 10⁹ multiply-adds per second: {products}; memory "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s."
    )


# For a terminal: columns of HEADER, and what each is called there.
NARROW = {0: "rival", 1: "µs/step", 3: "× BPTT", 4: "× hoisted", 5: "error", 6: "compile", 7: "temporary"}


def rich_tables(suite: dict[str, Any]) -> list[Table]:
    """For the terminal, one for each comparison."""
    found = []
    for record in suite["comparisons"]:
        table = Table(title=record["title"], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.padding = (0, 1, 0, 0)
        for column, name in NARROW.items():
            table.add_column(name, justify="right" if column else "left", no_wrap=not column)
        for row in rows(record, suite["machine"]):
            # Medians alone where there is a column for the wall time too.
            table.add_row(*(row[column].split(" ")[0] if column == 1 else row[column] for column in NARROW))
        found.append(table)
    return found


def markdown(suite: dict[str, Any]) -> str:
    """All tables of a suite, with the machine and a note on what was left unfinished."""
    parts = [machine_line(suite["machine"])]
    if suite["comparisons"]:
        parts[0] += f" Median (minimum) of {suite['rounds']} rounds in turn, unless the JSON says fewer."
    if suite["interrupted"]:
        parts.append("The run was interrupted: these are the comparisons known by then.")
    for record in suite["comparisons"]:
        names = _header(suite["machine"], record.get("reference", REFERENCE))
        parts += [f"**{record['title']}**", pages.table(names, rows(record, suite["machine"]))]
    peaks = [record["peak_bytes"] for record in suite["comparisons"] if "peak_bytes" in record]
    if peaks:
        parts.append(f"Most memory that the process ever held, data and all rivals together: {_bytes(max(peaks))}.")
    return "\n\n".join(parts)


def _per_step(seconds: list[float] | None, steps: int) -> str:
    if not seconds:
        return ""
    return f"{1e6 * statistics.median(seconds) / steps:.1f} ({1e6 * min(seconds) / steps:.1f})"


def _pair(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.2f} ({values[1]:.2f})"


def _error(error: float | None) -> str:
    return "–" if error is None or math.isnan(error) else f"{error:.2f}" if error >= 0.005 else f"{error:.0e}"


def _bytes(number: int | None) -> str:
    if number is None:
        return ""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
