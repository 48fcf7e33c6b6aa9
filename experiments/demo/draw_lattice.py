"""Draw docs/lattice.png: the paths from a parameter of the lowest layer to the loss, and which of them a rule follows.

python -m experiments.demo.draw_lattice
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch

from experiments.program.command import Parser
from experiments.program.pages import DOCS
from experiments.program.pictures import COLOURS, INK, pyplot, save

STEPS = 4
LAYERS = 3
RADIUS = 0.23
SOURCE = TIME = COLOURS["deep e-prop"]
DEPTH = COLOURS["hops = 0"]
FAINT = "#d9d9d9"

PANELS = (
    ("exact=True", "deep RTRL: equal to BPTT", "full"),
    ("exact=False", "deep e-prop: time inside a unit", "local"),
    ("hops=0", "time in the own layer alone", "own layer"),
)


def _arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float, style: str
) -> None:
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9 if colour == FAINT else 12,
            color=colour,
            linewidth=width,
            linestyle=style,
            shrinkA=0,
            shrinkB=0,
            zorder=1 if colour == FAINT else 2,
        )
    )


def _panel(axis: Axes, option: str, subtitle: str, mode: str) -> None:
    for layer in range(LAYERS):
        for step in range(STEPS):
            if step < STEPS - 1:
                followed = mode != "own layer" or layer == 0
                style = "solid" if mode == "full" else (0, (2, 1.2))
                colour, width, style = (TIME, 2.0, style) if followed else (FAINT, 1.2, "solid")
                _arrow(axis, (step + RADIUS, layer), (step + 1 - RADIUS, layer), colour, width, style)
            if layer < LAYERS - 1:
                _arrow(axis, (step, layer + RADIUS), (step, layer + 1 - RADIUS), DEPTH, 2.0, "solid")
            axis.add_patch(Circle((step, layer), RADIUS, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=3))
            axis.text(step, layer, rf"$h^{layer + 1}_{step + 1}$", ha="center", va="center", fontsize=10, zorder=4)
        axis.text(-0.75, layer, f"layer {layer + 1}", ha="right", va="center", fontsize=9, color=INK)
    for step in range(STEPS):
        _arrow(axis, (step - 0.36, -0.62), (step - 0.13, -RADIUS + 0.04), SOURCE, 1.4, "solid")
        axis.text(step - 0.48, -0.76, r"$\theta^1$", ha="center", va="center", fontsize=11, color=SOURCE)
    _arrow(axis, (STEPS - 1, LAYERS - 1 + RADIUS), (STEPS - 1, LAYERS - 0.42), INK, 1.4, "solid")
    axis.text(STEPS - 1, LAYERS - 0.27, r"$\mathcal{L}_4$", ha="center", va="center", fontsize=11)
    axis.text(-1.6, LAYERS + 0.28, option, family="monospace", fontsize=12, weight="bold", va="center")
    axis.text(-1.6, LAYERS - 0.05, subtitle, fontsize=10, color="#555555", va="center")
    axis.set_xlim(-1.65, STEPS - 0.5)
    axis.set_ylim(-0.95, LAYERS + 0.5)
    axis.set_aspect("equal")
    axis.axis("off")


def draw(path: Path) -> None:
    """Write the picture to ``path``."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13.2, 4.3), layout="constrained")
    for axis, panel in zip(axes, PANELS, strict=True):
        _panel(axis, *panel)
    figure.text(
        0.5,
        -0.02,
        "→ a move in time: solid, with the full Jacobian ∂h/∂h; dashed, with its unit-local blocks; grey, not followed"
        "       ↑ a move in depth, at the same step: always with the full Jacobian",
        ha="center",
        fontsize=10,
        color="#333333",
    )
    save(figure, path, dpi=130, bbox_inches="tight", facecolor="white")


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    Parser("experiments.demo.draw_lattice", __doc__).parse_args(arguments)
    draw(DOCS / "lattice.png")


if __name__ == "__main__":
    main()
