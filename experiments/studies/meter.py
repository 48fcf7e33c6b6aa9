"""Does the error meter tell the error of a gradient while a network learns? Beside the truth, on five tasks.

    python -m experiments.studies.meter               # trains; docs/fidelity/meter.json, its picture and table
    python -m experiments.studies.meter --report      # picture and table from the stored result

A network learns by a projected carry with R = 4, as in the sweeps of these names, watched by two meters: one with a
single probe a batch, one with sixteen. The truth beside each is the same running mean of what each probe's square has
as its mean, ‖ĝ − g‖² and ‖g‖² of that node, with g from BPTT: what is left between the two is the probes' chance.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from deepeprop_jax import LearnerState, deep_eprop, error_meter
from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.pictures import open_axes, pyplot, save
from experiments.studies.study import run_study
from experiments.sweeps import SWEEPS
from experiments.training import measure, settings
from experiments.training.rules import RULES

PyTree = Any
COMMAND = "python -m experiments.studies.meter"
STORED = Path("fidelity") / "meter.json"
TASKS = ("text_recall", "mixing", "motifs", "digits_blank_32", "xor_count_30")
"""Of the sweeps projected_NAME."""
RULE = "R = 4"
HORIZONS = {1: 100, 16: 500}
"""Probes at a time, and how many of a node a running mean looks back: 100 batches in which a node was probed, or so."""


def squares(tree: PyTree, trained: list[int]) -> jax.Array:
    """Per node ‖·‖²."""
    return jnp.stack([sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree[v])) for v in trained])


def curve(setting: settings.Settings, every: int, batches: int, probes: int) -> dict[str, list[float]]:
    """Train one network; per evaluation the meter's reading, its standard error, and the truth."""
    horizon = HORIZONS[probes]
    task, rule, optimiser = setting.task, setting.rule, setting.optimiser
    reference = RULES["BPTT"](task.network, task.loss_fn)
    meter_of = error_meter(deep_eprop(task.network), task.loss_fn, horizon=horizon, probes=probes)
    key, x = jax.random.key(setting.config.seed), measure.silence(task)
    params, _ = task.network.init(jax.random.fold_in(key, 0), x)
    carry = measure.initial_carry(task, x)
    trained = [v for v, part in enumerate(params) if jax.tree.leaves(part)]

    def batch(now: tuple, index: jax.Array) -> tuple[tuple, None]:
        params, optimiser_state, kept, meter, truth = now
        xs, targets = task.sample(key, index)
        state = rule.resume(rule.start(params, carry, x), kept)
        (_, after), grads = rule.piece(params, state, xs, targets)
        _, right = reference.gradient(params, carry, xs, targets)
        meter = meter_of.begin(meter, params, carry, x)
        before = meter.counts
        meter = meter_of.update(meter, params, LearnerState(carry, {}, None, carry), xs, targets, grads)
        each = jnp.maximum(1 / jnp.maximum(meter.counts, 1), 1 / horizon)
        rate = jnp.minimum(1, (meter.counts - before) * each)
        lost = squares(optax.tree.sub(grads, right), trained)
        means = [old + rate * (new - old) for old, new in zip(truth, (lost, squares(right, trained)), strict=True)]
        steps, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return (optax.apply_updates(params, steps), optimiser_state, rule.keep(after), meter, means), None

    advance = jax.jit(lambda now, first: jax.lax.scan(batch, now, first + jnp.arange(every))[0])
    nothing = jnp.zeros(len(trained))
    meter = meter_of.init(jax.random.fold_in(key, 1), params, carry, x)
    now = params, optimiser.init(params), rule.keep(rule.start(params, carry, x)), meter, [nothing, nothing]
    found: dict[str, list[float]] = {"batch": [], "meter": [], "uncertainty": [], "truth": []}
    for first in track(range(0, batches, every), setting.config.task):
        now = advance(now, first)
        read, (lost, size) = meter_of.error(now[3]), now[4]
        found["batch"].append(first + every)
        found["meter"].append(float(read.total))
        found["uncertainty"].append(float(read.uncertainty))
        found["truth"].append(float(jnp.sqrt(lost.sum() / size.sum())))
    return found


def measured() -> dict[str, Any]:
    """All tasks, one seed."""
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in TASKS:
        sweep = SWEEPS[f"projected_{name}"]
        config, _ = settings.read(sweep.arguments({"rule": RULE, "seed": 0}, Path("unused")))
        setting, every, batches = settings.make(config), config.evaluate_every, config.batches
        curves[name] = {str(probes): curve(setting, every, batches, probes) for probes in HORIZONS}
    return {"command": COMMAND, "rule": RULE, "curves": curves}


def deviations(one: dict[str, list[float]]) -> list[float]:
    """|meter / truth - 1| of each evaluation."""
    return [abs(meter / truth - 1) for meter, truth in zip(one["meter"], one["truth"], strict=True)]


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name, by_probes in result["curves"].items():
        for probes, one in by_probes.items():
            far = deviations(one)
            shown = [f"{one['truth'][i]:.2f}, {one['meter'][i]:.2f} ± {one['uncertainty'][i]:.2f}" for i in (0, -1)]
            counts = f"{sum(value <= 0.3 for value in far)} of {len(far)}"
            rows.append([name, probes, *shown, f"{statistics.median(far):.2f}", f"{max(far):.2f}", counts])
    heads = [
        "task",
        "probes",
        "first: truth, meter",
        "last: truth, meter",
        "median deviation",
        "largest",
        "within 30 %",
    ]
    return f"`{COMMAND}`, commit {result['commit']}; one seed.\n\n{pages.table(heads, rows)}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Meter and truth over batches, a panel for each task."""
    curves = result["curves"]
    figure, axes = pyplot.subplots(1, len(curves), figsize=(2.9 * len(curves), 2.8), layout="constrained")
    for axis, (name, by_probes) in zip(axes, curves.items(), strict=True):
        for probes, one in by_probes.items():
            read, spread = np.array(one["meter"]), np.array(one["uncertainty"])
            axis.plot(one["batch"], read, label=f"meter, probes={probes}", linewidth=1)
            axis.fill_between(one["batch"], read - spread, read + spread, alpha=0.3, linewidth=0)
        axis.plot(one["batch"], one["truth"], color="black", label="truth", linewidth=1)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("batches")
        axis.set_ylim(bottom=0)
        open_axes(axis)
    axes[0].set_ylabel("relative error against BPTT")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def fill(page: str, result: dict[str, Any]) -> str:
    """The page with the table between its markers."""
    picture = "![The error meter beside the truth while networks learn](../../fidelity/meter.png)"
    return pages.fill(page, "meter", f"{markdown(result)}\n\n{picture}")


def main(arguments: list[str] | None = None) -> int:
    """The measurement, or its report; returns the exit status."""
    return run_study(arguments, Parser("experiments.studies.meter", __doc__), str(STORED), measured, draw, fill)


if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
