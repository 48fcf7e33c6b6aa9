"""Check the library against its oracles on hundreds of random networks.

    python -m tests.fuzz --problems 300 --seed 0

Each result is appended to a log as it comes, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.program.command import Parser
from tests.fuzz.problems import check, modes, random_problem
from tests.gradients import FLOAT64

CLEAR_EVERY = 20  # problems; compiled programs are never used again and would fill the memory


def check_seed(seed: int) -> list[dict]:
    """One record per mode: the worst relative error, or the exception."""
    records = []
    problem = random_problem(seed)
    for exact, hops in modes(seed):
        start, failure = time.perf_counter(), None
        try:
            error = check(problem, exact, hops)
        except Exception as exception:  # a crash is a result: the run goes on and reports it
            error, failure = float("inf"), f"{type(exception).__name__}: {exception}"[:2000]
        wrong = error >= FLOAT64
        records.append(
            {
                "seed": seed,
                "exact": exact,
                "hops": hops,
                "error": error,
                "failure": failure,
                "seconds": round(time.perf_counter() - start, 2),
                "problem": problem.description if wrong else problem.description.splitlines()[0],
            }
        )
    return records


def summary(records: list[dict]) -> Table:
    """Per mode: how many problems, the worst and the median error, what failed."""
    table = Table("exact", "hops", "problems", "median error", "worst error", "wrong or crashed", "seconds each")
    for exact, hops in sorted({(row["exact"], row["hops"]) for row in records}, key=str):
        rows = [row for row in records if (row["exact"], row["hops"]) == (exact, hops)]
        errors = sorted(row["error"] for row in rows)
        wrong = [row["seed"] for row in rows if row["error"] >= FLOAT64]
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        cells = [str(exact), str(hops), str(len(rows)), f"{errors[len(rows) // 2]:.1e}", f"{errors[-1]:.1e}"]
        table.add_row(*cells, f"{len(wrong)} {wrong[:10] or ''}", f"{seconds:.1f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the problems that the log does not know yet, and print the summary of all; the exit status."""
    parser = Parser("tests.fuzz", __doc__)
    parser.add_argument("--problems", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--log", type=Path, default=Path("results/fuzz.jsonl"), help="results so far; delete it to start afresh"
    )
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)

    console = Console()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + options.problems)
    known = [json.loads(line) for line in options.log.read_text().splitlines()] if options.log.exists() else []
    records = [row for row in known if row["seed"] in seeds]
    done = {row["seed"] for row in records}
    waiting = [seed for seed in seeds if seed not in done]
    try:
        for count, seed in enumerate(track(waiting, f"{len(done)} of {len(seeds)} problems known", console=console), 1):
            new = check_seed(seed)
            records += new
            with options.log.open("a") as log:  # all modes of a seed at once, so that a seed is known or not
                log.write("".join(json.dumps(row) + "\n" for row in new))
            for row in new:
                if row["error"] >= FLOAT64:
                    reason = row["failure"] or f"error {row['error']:.1e}"
                    console.print(f"seed {seed}, exact={row['exact']}, hops={row['hops']}: {reason}", markup=False)
            if count % CLEAR_EVERY == 0:
                jax.clear_caches()
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from here.")
    if not records:
        return 0
    console.print(summary(records))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
    wrong = sorted({row["seed"] for row in records if row["error"] >= FLOAT64})
    total = len({row["seed"] for row in records})
    console.print(f"{total} problems, {len(wrong)} wrong {wrong or ''}; peak memory {peak:.1f} GiB; {options.log}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
