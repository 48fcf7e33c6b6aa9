"""T0 of all rules: each rule's gradient beside BPTT's on untrained networks. No training.

    python -m experiments.studies.fidelity_rules [--out FOLDER]

Two equal layers of 8 units and a linear readout see ten steps of noise, then ten steps of silence; the loss is the
squared error to random targets at the last step. Per layer, mean over five networks and sequences: the cosine of the
two gradients, all of a layer's parameters as one vector, and the ratio of their norms. Of a rule that draws, each
network and sequence is one draw. Prints a table and writes it to ``<out>/fidelity/rules.json`` (default ``docs``).
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from deepeprop_jax import deep_eprop, stack
from deepeprop_jax.reference import bptt
from deepeprop_jax.rules import immediate, kf_rtrl, kronecker_sum, rflo, snap, uoro
from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.commit import commit
from experiments.studies.fidelity_untrained import NOISE, OUTPUTS, SEEDS, Setting
from experiments.training.against_bptt import compare_layers

COMMAND = "python -m experiments.studies.fidelity_rules"
STORED = "fidelity/rules.json"
SETTING = Setting(depth=2, delay=10, width=8)
BATCH = 32
NAMES = ("tanh, gain 0.5", "tanh, gain 0.9", "tanh, gain 1.1", "GRU", "LRU", "IndRNN")
RULES: dict[str, Any] = {
    "deep e-prop": deep_eprop,
    "SnAp-1 (hops = 0)": lambda network: snap(network, 1),
    "SnAp-2": lambda network: snap(network, 2),
    "RFLO": rflo,
    "OK, r = 4": kronecker_sum,
    "KF-RTRL": kf_rtrl,
    "UORO": uoro,
    "immediate": immediate,
}


def loss_fn(y: jax.Array, target: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Squared error, weighted: mean over batch and outputs."""
    return target[1] * jnp.mean(optax.losses.squared_error(y, target[0]))


def figures(cell: str, rule: str, seeds: int = SEEDS) -> list[dict[str, float]]:
    """Cosine and norm ratio of each recurrent layer, from below, mean over the seeds."""
    setting = SETTING._replace(cell=cell)
    learner = RULES[rule](stack(*(setting.layer() for _ in range(setting.depth)), nn.Dense(OUTPUTS)))
    steps = NOISE + setting.delay
    online, backward = jax.jit(learner.value_and_grad(loss_fn)), jax.jit(bptt(learner.network, loss_fn))
    found = []
    for seed in range(seeds):
        xs_key, target_key, params_key, draw = jax.random.split(jax.random.key(seed), 4)
        xs = jax.random.normal(xs_key, (steps, BATCH, setting.width)).at[NOISE:].set(0)
        targets = jax.random.normal(target_key, (steps, BATCH, OUTPUTS)), jnp.zeros(steps).at[-1].set(1)
        params, carry = learner.network.init(params_key, xs[0])
        keys = (draw,) if rule in ("OK, r = 4", "KF-RTRL", "UORO") else ()
        _, grads = online(params, learner.init(params, carry, xs[0], *keys), xs, targets)
        _, reference = backward(params, carry, xs, targets)
        found.append(compare_layers(grads[:-1], reference[:-1]))
    return [
        {name: float(np.mean([layer[name] or 0.0 for layer in layers])) for name in ("cosine", "norm_ratio")}
        for layers in zip(*found, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and store."""
    parser = Parser("experiments.studies.fidelity_rules", __doc__)
    parser.add_argument("--out", type=Path, default=pages.DOCS, help="folder")
    parser.add_argument("--cells", nargs="*", default=NAMES, choices=NAMES, help="some of the cells")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks and sequences")
    options = parser.parse_args(arguments)
    rows, now = [], commit()
    print("| cell | rule | cosine, lower layer | upper layer | norm ratio, lower layer | upper layer |")
    print("|---|---|---:|---:|---:|---:|")
    for cell, rule in track(list(product(options.cells, RULES)), "cells and rules"):
        layers = figures(cell, rule, options.seeds)
        rows.append({"cell": cell, "rule": rule, "layers": layers})
        cells = [f"{layer[name]:.3f}" for name in ("cosine", "norm_ratio") for layer in layers]
        print(f"| {cell} | {rule} | {' | '.join(cells)} |", flush=True)
    path = options.out / STORED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": COMMAND, "commit": now, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    keep_compiled()
    main()
