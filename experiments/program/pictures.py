"""One look for all pictures: colours, axes, and how a picture is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK = "#222222"
COLOURS = {
    "BPTT": INK,
    "TBPTT(1)": "#d9a441",
    "TBPTT(10)": "#7d5ba6",
    "TBPTT(50)": "#b59ad0",
    "exact RTRL": "#4c9a52",
    "exact in segments": "#96c79a",
    "deep e-prop": "#c8402f",
    "e-prop in segments": "#c8402f",
    "hops = 1": "#7fb8e0",
    "hops = 0": "#3b6fb6",
    "immediate only": "#d9a441",
    "lower frozen": "#9a9a9a",
    "feed-forward": "#9a9a9a",
    "readout only": "#c9b8a8",
}
"""Of the rules; another one has matplotlib's own."""


def open_axes(*axes: Axes) -> None:
    """Without a frame above and on the right."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def band(axis: Axes, x: Any, curves: np.ndarray, rule: str, edge: float | None = None, **line: Any) -> Line2D:
    """The mean of the curves (seeds, points) in the rule's colour, with a band from the lowest seed to the highest.

    Args:
      edge: width of the band's own line; matplotlib's where not given.
      line: as ``plot`` takes it; its width is 1.8 where not given.
    """
    (drawn,) = axis.plot(x, curves.mean(axis=0), color=COLOURS.get(rule), label=rule, **{"linewidth": 1.8, **line})
    axis.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=drawn.get_color(), alpha=0.12, linewidth=edge)
    return drawn


def save(figure: Figure, path: Path, dpi: int = 110, **options: Any) -> None:
    """Store the picture, in a new folder if need be, and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, **options)
    pyplot.close(figure)
