"""On a GPU: how many kernels a step takes, and for how much of the time one is running.

    python -m experiments.benchmarks.kernels --out docs/benchmarks/kernels

Writes ``<device>.json``: per program the wall time (median of 5), and from one profiled run the time in which a kernel
was running, the number of launches, and the kernels that took longest.
"""

from __future__ import annotations

import collections
import gzip
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

from experiments.benchmarks.measure import REFERENCE
from experiments.benchmarks.problems import Problem
from experiments.benchmarks.rivals import RIVALS
from experiments.benchmarks.suites import ENGINE, SUITES
from experiments.benchmarks.timing import timed
from experiments.program.command import Parser


def on_device(events: Iterable[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Kernel -> (launches, microseconds), of the events of a Chrome trace that lie on a GPU's streams."""
    events = list(events)
    named = [event for event in events if event.get("ph") == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    found: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for event in events:
        if event.get("ph") != "X" or "GPU" not in processes.get(event["pid"], ""):
            continue
        if "Stream" in threads.get((event["pid"], event["tid"]), ""):
            launches, spent = found[event["name"]]
            found[event["name"]] = (launches + 1, spent + event["dur"])
    return dict(found)


def profiled(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """``on_device`` of one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(call())
        path = next(Path(folder).rglob("perfetto_trace.json.gz"))
        with gzip.open(path) as file:
            events = json.load(file)
    return on_device(events["traceEvents"] if isinstance(events, dict) else events)


def measure(problem: Problem, name: str) -> dict[str, Any]:
    """One program: its wall time, and the kernels of one run."""
    rival = RIVALS[name](problem)
    given = rival.arguments(problem)
    executable = jax.jit(rival.run).lower(*given).compile()

    def call() -> Any:
        return executable(*given)

    jax.block_until_ready(call())
    wall = statistics.median(timed(call)[1].wall for _ in range(5))
    kernels = profiled(call)
    return {
        "problem": str(problem),
        "rival": name,
        "steps": problem.steps,
        "wall_us": 1e6 * wall,
        "busy_us": sum(spent for _, spent in kernels.values()),
        "launches": sum(launches for launches, _ in kernels.values()),
        "longest": [(kernel, *seen) for kernel, seen in sorted(kernels.items(), key=lambda item: -item[1][1])[:8]],
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser("experiments.benchmarks.kernels", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/kernels"), help="folder for the results")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"error: counts a GPU's kernels; JAX runs on {jax.default_backend()!r} here", file=sys.stderr)
        return 1
    rows = []
    with jax.default_matmul_precision("highest"):
        for comparison, name in track(list(product(SUITES["gpu"].comparisons, (REFERENCE, *ENGINE))), "programs"):
            rows.append(measure(comparison.problem, name))
            wall, busy, launches = (rows[-1][key] / rows[-1]["steps"] for key in ("wall_us", "busy_us", "launches"))
            print(f"{comparison.problem}, {name}: {wall:.1f} µs a step, busy {busy:.1f}, {launches:.1f} launches")
    options.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind.replace(" ", "_")
    found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "programs": rows}
    (options.out / f"{device}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
