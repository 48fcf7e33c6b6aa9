"""Is ``lax.associative_scan`` faster inside a segment than the loop over its steps? For an element-wise recurrence.

    python -m experiments.benchmarks.associative --out docs/benchmarks/associative

h_t = λ h_{t-1} + u_t of complex units, whose λ no step and no example changes (as in an LRU); 64 steps, 128 units.
Writes ``<device>.json``: per batch and way the wall and CPU times of all rounds and the time to compile.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks.threads import fix_threads
from experiments.program.command import Parser

STEPS, UNITS, ROUNDS = 64, 128, 101


def measure(batch: int) -> dict[str, Any]:
    """Both ways on the same numbers: their times, and how far apart their results are."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from experiments.benchmarks.timing import Sample, alternate, timed

    def times(a: tuple, b: tuple) -> tuple:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]

    def plus(a: tuple, b: tuple) -> tuple:
        return a[0] + b[0], a[1] + b[1]

    def by_loop(eigenvalue: tuple, u: tuple) -> tuple:
        def body(h: tuple, u_t: tuple) -> tuple:
            h = plus(times(eigenvalue, h), u_t)
            return h, h

        return lax.scan(body, jax.tree.map(lambda part: jnp.zeros_like(part[0]), u), u)[1]

    def by_associative_scan(eigenvalue: tuple, u: tuple) -> tuple:
        def then(first: tuple, second: tuple) -> tuple:
            return times(first[0], second[0]), plus(times(second[0], first[1]), second[1])

        decay = jax.tree.map(lambda part: jnp.broadcast_to(part, (STEPS, 1, UNITS)), eigenvalue)
        return lax.associative_scan(then, (decay, u))[1]

    keys = jax.random.split(jax.random.key(0), 2)
    u = tuple(jax.random.normal(key, (STEPS, batch, UNITS)) for key in keys)
    angle = jnp.linspace(0, 1.5, UNITS)
    arguments = ((0.95 * jnp.cos(angle), 0.95 * jnp.sin(angle)), u)
    calls, results, record = {}, {}, {}
    for function in (by_loop, by_associative_scan):
        name = function.__name__
        compiled, sample = timed(lambda function=function: jax.jit(function).lower(*arguments).compile())
        calls[name] = lambda compiled=compiled: compiled(*arguments)
        results[name] = jax.block_until_ready(calls[name]())
        record[name] = {"compile_wall": sample.wall}
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    alternate(calls, ROUNDS, samples, lambda _: None)
    for name, found in samples.items():
        record[name] |= {"wall": [s.wall for s in found], "cpu": [s.cpu for s in found]}
    pairs = zip(*results.values(), strict=True)
    return {"batch": batch, "ways": record, "difference": max(float(jnp.abs(a - b).max()) for a, b in pairs)}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser("experiments.benchmarks.associative", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/associative"), help="folder")
    options = parser.parse_args(arguments)
    fix_threads(1)
    import jax

    device = jax.devices()[0].device_kind
    found = [measure(batch) for batch in (1, 16)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{device.replace(' ', '_')}.json").write_text(
        json.dumps({"device": device, "jax": jax.__version__, "threads": 1, "found": found}, indent=1) + "\n"
    )
    for one in found:
        for name, way in one["ways"].items():
            wall = statistics.median(way["wall"]) * 1e6
            print(f"batch {one['batch']:2d}  {name:20s}  {wall:6.0f} µs  compiled in {way['compile_wall']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
