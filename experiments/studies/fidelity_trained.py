"""T0 on trained networks: BPTT trains, and on its way the gradients of the other rules are set beside its own.

    python -m experiments.studies.fidelity_trained [--out FOLDER]   # 20 minutes on one core
    python -m experiments.studies.fidelity_trained --report         # the page's part from the stored figures

Every case is a training configuration. At the start, after a tenth and a half of the batches and at the end, all rules
see the same parameters and the same training batch, a new one; nothing but BPTT changes the parameters.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import track

from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.pictures import COLOURS, open_axes, pyplot, save
from experiments.studies.study import run_study
from experiments.sweeps.shared import XOR_20, XOR_30
from experiments.training import settings
from experiments.training.loop import Loop
from experiments.training.rules import RULES

COMMAND = "python -m experiments.studies.fidelity_trained"
STORED = "fidelity/trained.json"
COMPARED = ("deep e-prop", "hops = 0")
MOMENTS = ("start", "a tenth", "half", "end")
SEEDS = 3


class Case(NamedTuple):
    """A training configuration, shortened or changed.

    Attributes:
      config: its file.
      fields: what differs from the file.
    """

    config: str
    fields: dict[str, Any]


def _xor(base: dict[str, Any], **options: Any) -> Case:
    return Case("configs/xor_count.py", base | {f"xor_count.{name}": value for name, value in options.items()})


def _digits(layers: int) -> Case:
    return Case("configs/digits.py", {"digits.layers": layers, "batches": 500})


CASES: dict[str, Case] = {
    "XOR-count, delay 30": _xor(XOR_30),
    "XOR-count, one relay": _xor(XOR_20, depth=3),
    "XOR-count, two relays": _xor(XOR_20, depth=4),
    "XOR-count, mixing 0.1": _xor(XOR_20, angle=0.1),
    "XOR-count, mixing 0.5": _xor(XOR_20, angle=0.5),
    "digits, 2 GRU layers": _digits(2),
    "digits, 3 GRU layers": _digits(3),
    "digits, 5 GRU layers": _digits(5),
    "text, 2 GRU layers": Case("configs/text.py", {"text.features": 16, "batches": 1000, "evaluate_every": 100}),
}


def measure(case: Case, seed: int) -> dict[str, Any]:
    """The accuracy on the test set at every moment, and per rule and moment the layers' figures (``compare``)."""
    fields = {**case.fields, "rule": "BPTT", "seed": seed}
    config, _ = settings.read(
        [f"--config={case.config}", *(f"--config.{name}={value}" for name, value in fields.items())]
    )
    setting = settings.make(config)

    def loop(rule: str) -> Loop:
        made = RULES[rule](setting.task.network, setting.task.loss_fn)
        return Loop(setting.task, made, setting.optimiser, setting.length, config.evaluate_every)

    loops = {rule: loop(rule) for rule in ("BPTT", *COMPARED)}
    key, every = jax.random.key(seed), config.evaluate_every
    learning = loops["BPTT"].start(key)
    moments = [round(config.batches * share / every) * every for share in (0, 0.1, 0.5, 1)]
    measured: dict[int, dict[str, Any]] = {}
    for batch in range(0, config.batches + 1, every):
        if batch in moments:
            measured[batch] = {rule: loops[rule].fidelity(learning, key, batch) for rule in COMPARED}
            measured[batch] |= loops["BPTT"].test(learning.params)
        if batch < config.batches:
            learning, _ = loops["BPTT"].advance(learning, key, np.int32(batch))
    return {
        "batches": moments,
        "test_accuracy": [measured[batch]["test_accuracy"] for batch in moments],
        "layers": {rule: [measured[batch][rule] for batch in moments] for rule in COMPARED},
    }


def over_seeds(runs: list[dict[str, Any]], rule: str, moment: int, figure: str) -> list[float | None]:
    """A figure per layer, from bottom to top: the median of the seeds on which it is defined."""
    layers = zip(*(run["layers"][rule][moment] for run in runs), strict=True)
    known = [[one[figure] for one in layer if one[figure] is not None] for layer in layers]
    return [statistics.median(values) if values else None for values in known]


def markdown(result: dict[str, Any]) -> str:
    """Per case a row of accuracies, and two rows per rule: cosines and norm ratios."""
    heads, rows = ["network trained by BPTT", "rule", "figure", *MOMENTS], []
    for name, runs in result["cases"].items():
        shares = [statistics.mean(run["test_accuracy"][moment] for run in runs) for moment in range(len(MOMENTS))]
        rows.append([name, "BPTT", "test accuracy", *(f"{share:.3f}" for share in shares)])
        for rule in COMPARED:
            for figure in ("cosine", "norm_ratio"):
                cells = []
                for moment in range(len(MOMENTS)):
                    values = over_seeds(runs, rule, moment, figure)[:-1]  # without the readout, where all rules agree
                    cells.append(" ".join("–" if value is None else f"{value:.2f}" for value in values))
                rows.append(["", rule, figure.replace("_", " "), *cells])
    words = (
        f"`{COMMAND}`, commit {result['commit']}; medians of {SEEDS} seeds (test accuracy: means). Layers "
        "from bottom to top, without the readout."
    )
    return f"{words}\n\n{pages.table(heads, rows, words=3)}"


def draw(result: dict[str, Any], path: Path) -> None:
    """The lowest layer's cosine at the four moments, a panel per rule."""
    figure, axes = pyplot.subplots(1, len(COMPARED), figsize=(9, 3.4), layout="constrained", sharey=True)
    for axis, rule in zip(axes, COMPARED, strict=True):
        for name, runs in result["cases"].items():
            lowest = [over_seeds(runs, rule, moment, "cosine")[0] for moment in range(len(MOMENTS))]
            axis.plot(MOMENTS, [np.nan if value is None else value for value in lowest], "o-", label=name)
        axis.set_title(rule, loc="left", fontsize=10, color=COLOURS.get(rule))
        open_axes(axis)
    axes[0].set_ylabel("cosine to BPTT, lowest layer")
    axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def fill(page: str, result: dict[str, Any]) -> str:
    """The page with the table between its markers."""
    body = f"{markdown(result)}\n\n![Cosine to BPTT of the lowest layer while BPTT trains](../../fidelity/trained.png)"
    return pages.fill(page, "fidelity trained", body)


def measure_all() -> dict[str, Any]:
    """Every case with every seed."""
    cases: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for name, seed in track([(name, seed) for name in CASES for seed in range(SEEDS)], "cases"):
        cases[name].append(measure(CASES[name], seed))
    return {"command": COMMAND, "cases": cases}


def main(arguments: list[str] | None = None) -> int:
    """The measurement, or its report."""
    return run_study(
        arguments, Parser("experiments.studies.fidelity_trained", __doc__), STORED, measure_all, draw, fill
    )


if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
