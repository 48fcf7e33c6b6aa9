"""How far each rule of other libraries is from BPTT through their own networks, and this library's modes on the same.

    python -m experiments.studies.peers [--out FOLDER]

In an environment with braintrace, and memorax from its repository (docs/peers.md says which versions): two recurrent
layers of their own cell, 16 units, T = 10, batch 8, loss at every step; mean over three networks and sequences. The
same weights are given to the same mathematics here, and BPTT through both must agree. Prints a table and writes it to
``<out>/fidelity/peers.json`` (default ``docs``).
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from deepeprop_jax import deep_eprop, stack
from deepeprop_jax.reference import bptt
from experiments.peers import with_braintrace, with_memorax
from experiments.peers.network import Sizes, Theirs, loss_fn
from experiments.program import pages
from experiments.program.command import Parser, keep_compiled
from experiments.program.commit import commit
from experiments.program.refusal import Refused
from experiments.training.against_bptt import compare_layers

COMMAND = "python -m experiments.studies.peers"
STORED = "fidelity/peers.json"
SEEDS = 3
AGREE = 1e-5
"""At most, between BPTT through their network and through ours: float32 in another order."""
LIBRARIES: dict[str, Any] = {"braintrace": with_braintrace, "memorax": with_memorax}
MODES: dict[str, dict[str, Any]] = {
    "hops=0": {"hops": 0},
    "deep e-prop": {},
    "exact=True, hops=0": {"exact": True, "hops": 0},
    "exact=True": {"exact": True},
}


def measure(theirs: Theirs, sizes: Sizes, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Per rule of theirs and mode of ours, each layer's gradient beside that of BPTT through their network.

    Raises:
      Refused: BPTT through our network has another gradient.
    """
    xs_key, target_key = jax.random.split(jax.random.key(seed))
    xs = jax.random.normal(xs_key, (sizes.steps, sizes.batch, sizes.units))
    targets = jax.random.normal(target_key, (sizes.steps, sizes.batch, sizes.outputs))
    reference = theirs.bptt(xs, targets)
    network = stack(*theirs.cells)
    _, carry = network.init(jax.random.key(0), xs[0])
    ours = jax.jit(bptt(network, loss_fn))(theirs.params, carry, xs, targets)[1]
    apart = [layer["relative_error"] for layer in compare_layers(ours, reference)]
    if not max(apart) < AGREE:
        raise Refused(f"BPTT through the same network here has another gradient: relative errors {apart}.")
    found = {name: _beside(rule(xs, targets), reference) for name, rule in theirs.rules.items()}
    for name, options in MODES.items():
        learner = deep_eprop(network, **options)
        state = learner.init(theirs.params, carry, xs[0])
        _, grads = jax.jit(learner.value_and_grad(loss_fn, segment_length=1))(theirs.params, state, xs, targets)
        found[f"here: {name}"] = _beside(grads, reference)
    return found


def _beside(grads: tuple, reference: tuple) -> list[dict[str, Any]]:
    """Of the recurrent layers, with the names of the parameters whose gradient is zero though BPTT's is not."""
    layers = compare_layers(grads[:-1], reference[:-1])
    for layer, own, right in zip(layers, grads, reference, strict=False):
        layer["zero"] = sorted(name for name in right if _size(own[name]) == 0 < _size(right[name]))
    return layers


def _size(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def mean(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each layer, over the seeds; the zeros are those of the first."""
    return [
        {"zero": layers[0]["zero"]}
        | {
            name: float(np.mean([layer[name] for layer in layers]))
            for name in ("relative_error", "cosine", "norm_ratio")
        }
        for layers in zip(*runs, strict=True)
    ]


def table(rows: list[dict[str, Any]], library: str) -> str:
    """Of one library, in Markdown: a row for each rule, and for each cell the errors of lower and upper layer."""
    own = [row for row in rows if row["library"] == library]
    cells, rules = (list(dict.fromkeys(row[name] for row in own)) for name in ("cell", "rule"))
    layers = {(row["rule"], row["cell"]): row["layers"] for row in own}

    def errors(rule: str, cell: str) -> str:
        return "; ".join(f"{layer['relative_error']:.2g}" for layer in layers[rule, cell])

    return pages.table(
        (f"{library}, rule", *cells), [[rule, *(errors(rule, cell) for cell in cells)] for rule in rules]
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and store."""
    parser = Parser("experiments.studies.peers", __doc__)
    parser.add_argument("--out", type=Path, default=pages.DOCS, help="folder")
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=LIBRARIES, help="some of them")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks and sequences")
    options = parser.parse_args(arguments)
    for name in options.libraries:
        if (reason := LIBRARIES[name].missing()) is not None:
            parser.error(f"{reason}: leave it out with --libraries, or see docs/peers.md")
    rows, now, sizes = [], commit(), Sizes()
    cases = [(library, cell) for library in options.libraries for cell in LIBRARIES[library].CELLS]
    for library, cell in track(cases, "libraries and cells"):
        make = LIBRARIES[library].network
        runs = [measure(make(cell, sizes, seed), sizes, seed) for seed in range(options.seeds)]
        for rule in runs[0]:
            layers = mean([run[rule] for run in runs])
            rows.append({"library": library, "cell": cell, "rule": rule, "layers": layers})
    versions = {name: import_module(name).__version__ for name in (*options.libraries, "jax")}
    for library in options.libraries:
        print(table(rows, library))
    path = options.out / STORED
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": COMMAND, "commit": now, "versions": versions, "sizes": sizes._asdict(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    keep_compiled()
    main()
