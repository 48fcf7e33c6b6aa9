"""Time, compile time, memory and gradient error of this library and its rivals.

    python -m experiments.benchmarks --suite acceptance --rounds 7 --out results/benchmarks

Writes a JSON, a table in Markdown and a picture for each suite, as it goes; Ctrl-C keeps what is known by then.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.benchmarks.threads import fix_threads
from experiments.program import pages
from experiments.program.command import Parser
from experiments.program.refusal import Refused, check_name

STORED = pages.DOCS / "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status (130 after Ctrl-C)."""
    parser = Parser("experiments.benchmarks", __doc__)
    parser.add_argument("--suite", nargs="+", default=["acceptance"], help="one or more, or 'all'")
    parser.add_argument(
        "--rounds", "--runs", type=int, default=7, help="timed runs of every rival, in turn (default 7)"
    )
    parser.add_argument("--only", default="", help="only the comparisons whose title holds this text ('GRU, H = 128')")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder for the results")
    options = parser.parse_args(arguments)
    fix_threads(options.threads)
    import jax

    from experiments.benchmarks.run import run_suites
    from experiments.benchmarks.suites import SUITES, only

    wanted = list(SUITES) if "all" in options.suite else options.suite
    try:
        for name in options.suite:
            check_name("suite", name, ["all", *SUITES])
    except Refused as error:
        parser.error(str(error))
    if "all" in options.suite and jax.default_backend() != "gpu":
        wanted.remove("gpu")  # its stored figures are a GPU's
    if not options.only:
        return run_suites({name: SUITES[name] for name in wanted}, options.rounds, options.out)
    if options.out.resolve() == STORED:
        parser.error(
            "--only makes a part of a suite, and what is stored in docs/benchmarks is whole: give another --out"
        )
    suites = {name: suite for name in wanted if (suite := only(SUITES[name], options.only)).comparisons}
    if not suites:
        titles = [str(comparison.problem) for name in wanted for comparison in SUITES[name].comparisons]
        parser.error(f"no comparison's title holds {options.only!r}; there are:\n  " + "\n  ".join(titles))
    return run_suites(suites, options.rounds, options.out)


if __name__ == "__main__":
    sys.exit(main())
