"""The record of a suite as a picture: bars for each comparison, or lines against a size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.measure import REFERENCE
from experiments.benchmarks.problems import Problem
from experiments.benchmarks.report import ratio
from experiments.program.pictures import INK, open_axes, pyplot, save

LABELS = {
    "ratio": "time, × BPTT",
    "temporary_bytes": "temporary bytes",
    "compile_cpu": "CPU seconds to compile",
    "steps": "T",
    "features": "H",
    "layers": "L",
    "batch": "batch",
    "segment": "C",
}


def draw(suite: dict[str, Any], path: Path) -> bool:
    """Write the picture; False where nothing is known that could be drawn."""
    values = [_values(record, suite["picture"], suite["machine"]["clock"]) for record in suite["comparisons"]]
    if not any(values):
        return False
    figure = _lines(suite, values) if suite["against"] else _bars(suite, values)
    save(figure, path, dpi=130)
    return True


def _values(record: dict[str, Any], picture: str, clock: str) -> dict[str, float]:
    """What is drawn, by rival."""
    found = {}
    for name, entry in record["rivals"].items():
        if picture == "ratio":
            pair = ratio(entry, record["rivals"].get(REFERENCE), clock)
            value = None if pair is None else pair[0]
        elif picture in entry:
            value = float(np.median(entry[picture]))
        else:
            value = None
        if value is not None:
            found[name] = value
    return found


def _colours(values: list[dict[str, float]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for found in values for name in found))
    palette = pyplot.get_cmap("tab20")
    return {name: INK if name == REFERENCE else palette(index % 20) for index, name in enumerate(names)}


def _bars(suite: dict[str, Any], values: list[dict[str, float]]) -> Any:
    colours = _colours(values)
    rows = sum(len(found) for found in values) + len(values)
    figure, axis = pyplot.subplots(figsize=(8, 1 + 0.2 * rows), layout="constrained")
    places, labels, place = [], [], 0.0
    for record, found in zip(suite["comparisons"], values, strict=True):
        axis.text(
            0, place, record["title"], transform=axis.get_yaxis_transform(), fontsize=7.5, weight="bold", va="center"
        )
        place += 1
        for name, value in found.items():
            axis.barh(place, value, color=colours[name], height=0.8)
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=7)
            places.append(place)
            labels.append(name)
            place += 1
    axis.set_yticks(places, labels, fontsize=7.5)
    axis.set_ylim(place - 0.4, -0.9)  # downwards, with room for the first title
    if suite["picture"] == "ratio":
        axis.set_xscale("log")
        axis.set_xlim(left=0.1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.axvline(1, color=INK, linewidth=0.8)
    _finish(axis, LABELS[suite["picture"]])
    axis.set_title(suite["title"], loc="left", fontsize=10)
    return figure


def _lines(suite: dict[str, Any], values: list[dict[str, float]]) -> Any:
    """A panel for each size; its points are the comparisons that differ from the first in that size alone."""
    colours = _colours(values)
    against = suite["against"]
    figure, axes = pyplot.subplots(
        1, len(against), figsize=(4 * len(against), 3.4), layout="constrained", squeeze=False
    )
    base = suite["comparisons"][0]["problem"]
    for axis, field in zip(axes[0], against, strict=True):
        for name, colour in colours.items():
            points = sorted(
                (record["problem"][field], found[name])
                for record, found in zip(suite["comparisons"], values, strict=True)
                if name in found
                and all(base[other] == record["problem"][other] for other in Problem._fields if other != field)
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=name, marker="o", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _finish(axis, LABELS[field])
    axes[0][0].set_ylabel(LABELS[suite["picture"]])
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.suptitle(suite["title"], x=0.01, ha="left", fontsize=10)
    return figure


def _finish(axis: Any, label: str) -> None:
    axis.set_xlabel(label)
    open_axes(axis)
    axis.set_axisbelow(True)
