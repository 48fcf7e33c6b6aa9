"""T0: the gradient of deep e-prop beside BPTT's on untrained networks, one dial at a time. No training.

    python -m experiments.studies.fidelity_untrained [--out FOLDER]   # a quarter of an hour on one core
    python -m experiments.studies.fidelity_untrained --report         # the page's part from the stored figures

``depth`` equal layers and a linear readout see ten steps of noise, then ``delay`` steps of silence; the loss is the
squared error to random targets, at the last step or at every step. Per layer, mean over five networks and sequences:
the cosine of the two gradients, all of a layer's parameters as one vector, and the ratio of their norms.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.progress import track

from deepeprop_jax import Cell, deep_eprop, stack
from deepeprop_jax.cells import indrnn, lif, lru
from deepeprop_jax.reference import bptt
from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.pictures import COLOURS, open_axes, pyplot, save
from experiments.studies.study import run_study
from experiments.tasks.networks import relay, rotated_integrator
from experiments.training.against_bptt import compare_layers

COMMAND = "python -m experiments.studies.fidelity_untrained"
STORED = "fidelity/study.json"
NOISE, BATCH, OUTPUTS, SEEDS = 10, 4, 4, 5
RULES: dict[str, dict[str, Any]] = {"deep e-prop": {}, "hops = 0": {"hops": 0}}
CELLS: dict[str, Callable[[int], Cell | nn.Module]] = {
    "tanh, gain 0": lambda n: relay(n, leak=0.5, recurrent_gain=0.0, input_gain=1.0),
    "tanh, gain 0.5": lambda n: relay(n, leak=0.5, recurrent_gain=0.5, input_gain=1.0),
    "tanh, gain 0.9": lambda n: relay(n, leak=0.5, recurrent_gain=0.9, input_gain=1.0),
    "tanh, gain 1.1": lambda n: relay(n, leak=0.5, recurrent_gain=1.1, input_gain=1.0),
    "tanh, gain 2": lambda n: relay(n, leak=0.5, recurrent_gain=2.0, input_gain=1.0),
    "GRU": lambda n: nn.GRUCell(features=n),
    "LSTM": lambda n: nn.OptimizedLSTMCell(features=n),
    "LRU": lambda n: lru(n, n),
    "IndRNN": lambda n: indrnn(n),
    "LIF": lambda n: lif(n, recurrent=False),
}
LINEAR = "linear memory"
DECAY = 0.95
"""Of a linear memory, whose units an angle mixes."""


class Setting(NamedTuple):
    """What is varied, one at a time; the defaults are the others' values."""

    cell: str = "tanh, gain 0.9"
    depth: int = 3
    delay: int = 20
    width: int = 16
    loss: str = "last step"
    angle: float = 0.0

    def layer(self) -> Cell | nn.Module:
        """One of the network's recurrent layers."""
        linear = self.cell == LINEAR
        return rotated_integrator(self.width, DECAY, self.angle) if linear else CELLS[self.cell](self.width)


DIALS: dict[str, tuple] = {
    "cell": tuple(CELLS),
    "depth": (1, 2, 3, 4, 5),
    "delay": (5, 10, 20, 50, 100, 200),
    "width": (8, 16, 32, 64, 128, 256),
    "loss": ("last step", "every step"),
    "angle": (0.0, 0.02, 0.1, 0.2, 0.5, 1.0),
}
DEEP = 5
"""Depth at which cells are compared."""
BASES: dict[str, dict[str, Any]] = {"cell": {"depth": DEEP}, "angle": {"cell": LINEAR}}
"""What else is different where a dial is turned."""


def settings() -> Iterator[tuple[str, Setting]]:
    """Every dial's settings."""
    for dial, values in DIALS.items():
        for value in values:
            yield dial, Setting(**BASES.get(dial, {}) | {dial: value})


def measure(setting: Setting, seeds: int = SEEDS) -> dict[str, list[dict[str, float | None]]]:
    """Per rule and layer, from bottom to top, the mean cosine and norm ratio."""
    network = stack(*(setting.layer() for _ in range(setting.depth)), nn.Dense(OUTPUTS))
    steps = NOISE + setting.delay
    counted = jnp.ones(steps) if setting.loss == "every step" else jnp.zeros(steps).at[-1].set(1.0)

    def loss_fn(y: jax.Array, target: tuple[jax.Array, jax.Array]) -> jax.Array:
        return target[1] * jnp.mean(optax.losses.squared_error(y, target[0]))

    learners = {rule: deep_eprop(network, **options) for rule, options in RULES.items()}
    runs = {rule: jax.jit(learner.value_and_grad(loss_fn)) for rule, learner in learners.items()}
    backward = jax.jit(bptt(network, loss_fn))
    found: dict[str, list[list[dict[str, float | None]]]] = {rule: [] for rule in RULES}
    for seed in range(seeds):
        xs_key, target_key, params_key = jax.random.split(jax.random.key(seed), 3)
        xs = (
            jnp.zeros((steps, BATCH, setting.width))
            .at[:NOISE]
            .set(jax.random.normal(xs_key, (NOISE, BATCH, setting.width)))
        )
        targets = (jax.random.normal(target_key, (steps, BATCH, OUTPUTS)), counted)
        params, carry = network.init(params_key, xs[0])
        _, reference = backward(params, carry, xs, targets)
        for rule, learner in learners.items():
            _, grads = runs[rule](params, learner.init(params, carry, xs[0]), xs, targets)
            found[rule].append(compare_layers(grads[:-1], reference[:-1]))
    return {rule: [_mean(layer) for layer in zip(*by_seed, strict=True)] for rule, by_seed in found.items()}


def _mean(seeds: tuple[dict[str, float | None], ...]) -> dict[str, float | None]:
    """Over the seeds on which a figure is defined (the cosine of a zero gradient is not); None where there is none."""
    values = {name: [seed[name] for seed in seeds if seed[name] is not None] for name in ("cosine", "norm_ratio")}
    return {name: statistics.mean(known) if known else None for name, known in values.items()}


def table(result: dict[str, Any], dial: str) -> str:
    """A dial's figures in Markdown: a row per value."""
    heads = [dial, *(f"{rule}: {figure}" for rule in RULES for figure in ("cosine", "norm ratio"))]
    rows = []
    for row in result["rows"]:
        if row["dial"] == dial:
            cells = [str(row["setting"][dial])]
            for rule in RULES:
                layers = row["layers"][rule]
                cells.append(" ".join(_cosine(layer["cosine"]) for layer in layers))
                cells.append(" ".join(_ratio(layer["norm_ratio"]) for layer in layers))
            rows.append(cells)
    return pages.table(heads, rows)


def _cosine(value: float | None) -> str:
    if value is None:
        return "–"
    return "1" if value > 1 - 1e-6 else f"{min(value, 0.999):.3f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    base = ", ".join(f"{name} {value}" for name, value in Setting()._asdict().items() if name != "angle")
    parts = [
        f'`{COMMAND}`, commit {result["commit"]}; {SEEDS} seeds. Layers from bottom to top; "1" is a cosine '
        f"above 1 − 10⁻⁶. Unless varied: {base}; cells are compared at depth {DEEP}, angles with a linear memory "
        f"(λ = {DECAY}), whose state they rotate at each step."
    ]
    return "\n\n".join(parts + [table(result, dial) for dial in DIALS])


def draw(result: dict[str, Any], path: Path) -> None:
    """Cosine of the lowest and the topmost layer against depth, delay, width and mixing."""
    dials = {"depth": "layers", "delay": "delay, steps", "width": "units a layer", "angle": "mixing: angle"}
    figure, axes = pyplot.subplots(1, len(dials), figsize=(13, 3.2), layout="constrained", sharey=True)
    for axis, (dial, label) in zip(axes, dials.items(), strict=True):
        rows = [row for row in result["rows"] if row["dial"] == dial]
        values = [row["setting"][dial] for row in rows]
        for rule in RULES:
            lowest = [row["layers"][rule][0]["cosine"] for row in rows]
            axis.plot(values, lowest, "o-", color=COLOURS.get(rule), label=f"{rule}, lowest layer")
        # Above the topmost layer nothing remembers: there both rules are one.
        topmost = [row["layers"]["hops = 0"][-1]["cosine"] for row in rows]
        axis.plot(values, topmost, "^:", color="grey", label="both, topmost layer")
        axis.set_xlabel(label)
        open_axes(axis)
    axes[1].set_xscale("log")
    axes[2].set_xscale("log", base=2)
    axes[0].set_ylabel("cosine to BPTT")
    axes[-1].legend(frameon=False)
    save(figure, path)


def fill(page: str, result: dict[str, Any]) -> str:
    """The page with the study's tables between its markers."""
    body = f"{markdown(result)}\n\n![Cosine to BPTT against depth, delay, width and mixing](../../fidelity/study.png)"
    return pages.fill(page, "fidelity study", body)


def measure_all() -> dict[str, Any]:
    """Every setting of every dial."""
    rows = [
        {"dial": dial, "setting": setting._asdict(), "layers": measure(setting)}
        for dial, setting in track(list(settings()), "settings")
    ]
    return {"command": COMMAND, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """The study, or its report."""
    return run_study(
        arguments, Parser("experiments.studies.fidelity_untrained", __doc__), STORED, measure_all, draw, fill
    )


if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
