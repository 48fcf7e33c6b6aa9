"""How far each mode's gradient is from BPTT's, layer by layer, on untrained two-layer networks.

    python -m experiments.studies.fidelity_modes [--out FOLDER]

T = 10, batch 8, 16 units, loss at every step; mean over five random networks and sequences. Prints a table and writes
it to ``<out>/fidelity/modes.json`` (default ``docs``); docs/modes.md shows it.
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
from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.commit import commit
from experiments.training.against_bptt import compare_layers

UNITS, STEPS, BATCH, INPUTS, OUTPUTS, SEEDS = 16, 10, 8, 8, 4, 5
STORED = "fidelity/modes.json"
CELLS = {"SimpleCell": nn.SimpleCell, "GRUCell": nn.GRUCell}
MODES: dict[str, dict[str, Any]] = {
    "exact=True": {"exact": True},
    "exact=True, hops=0": {"exact": True, "hops": 0},
    "deep e-prop": {},
    "deep e-prop, hops=0": {"hops": 0},
}


def squared_error(y: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over batch and outputs."""
    return jnp.mean(optax.losses.squared_error(y, target))


def relative_errors(cell: type[nn.RNNCellBase], options: dict[str, Any]) -> np.ndarray:
    """‖g − g_BPTT‖ / ‖g_BPTT‖ of each recurrent layer, mean over the seeds."""
    learner = deep_eprop(stack(cell(features=UNITS), cell(features=UNITS), nn.Dense(OUTPUTS)), **options)
    online = jax.jit(learner.value_and_grad(squared_error, segment_length=1))
    backward = jax.jit(bptt(learner.network, squared_error))
    errors = []
    for seed in range(SEEDS):
        xs_key, target_key, params_key = jax.random.split(jax.random.key(seed), 3)
        xs = jax.random.normal(xs_key, (STEPS, BATCH, INPUTS))
        targets = jax.random.normal(target_key, (STEPS, BATCH, OUTPUTS))
        params, carry = learner.network.init(params_key, xs[0])
        _, grads = online(params, learner.init(params, carry, xs[0]), xs, targets)
        _, reference = backward(params, carry, xs, targets)
        errors.append([layer["relative_error"] for layer in compare_layers(grads[:-1], reference[:-1])])
    return np.mean(errors, axis=0)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and store."""
    parser = Parser("experiments.studies.fidelity_modes", __doc__)
    parser.add_argument("--out", type=Path, default=pages.DOCS, help="folder")
    path = parser.parse_args(arguments).out / STORED
    rows, now = [], commit()
    print("| mode | cell | lower layer | upper layer |\n|---|---|---:|---:|")
    for mode, name in track(list(product(MODES, CELLS)), "modes and cells"):
        lower, upper = (float(error) for error in relative_errors(CELLS[name], MODES[mode]))
        rows.append({"mode": mode, "cell": name, "lower": lower, "upper": upper})
        print(f"| {mode} | {name} | {lower:.2g} | {upper:.2g} |", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": "python -m experiments.studies.fidelity_modes", "commit": now, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    keep_compiled()
    main()
