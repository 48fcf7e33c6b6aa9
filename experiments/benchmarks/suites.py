"""The suites: which problems, which rivals, and what the picture is drawn against."""

from __future__ import annotations

from typing import NamedTuple

from experiments.benchmarks.measure import HOISTED, REFERENCE, Comparison
from experiments.benchmarks.problems import Problem

BACKWARD = (REFERENCE, HOISTED, "BPTT, checkpointed", "BPTT, truncated")
ENGINE = ("hops=0", "hops=0, exact inside")
PEER = ("braintrace D_RTRL", "braintrace D_RTRL, windows", "braintrace ES_D_RTRL")


class Suite(NamedTuple):
    """Comparisons that answer one question.

    Attributes:
      title: the question.
      comparisons: in the order in which they run.
      picture: what its picture shows: a ratio to BPTT, or one of ``temporary_bytes`` and ``compile_cpu``.
      against: the fields of ``Problem`` that it is drawn against, a panel for each; bars per comparison without any.
    """

    title: str
    comparisons: tuple[Comparison, ...]
    picture: str = "ratio"
    against: tuple[str, ...] = ()


def _acceptance() -> tuple[Comparison, ...]:
    of_cell = {"leaky tanh": (128, 256)} | dict.fromkeys(("GRU", "LSTM", "OptimizedLSTM", "LRU", "complex LRU"), (128,))
    found = []
    for batch in (16, 1):
        for cell, sizes in (of_cell | {"ALIF": (128,)}).items():
            for features in sizes:
                peer = PEER if cell == "leaky tanh" and features == 256 and batch == 16 else ()
                found.append(Comparison(Problem(cell, features, batch=batch), (*BACKWARD, *ENGINE, *peer)))
    return tuple(found)


def _length() -> tuple[Comparison, ...]:
    rivals = (*BACKWARD, *ENGINE, "all hops", "exact")
    lengths = (256, 1024, 4096, 16_384, 65_536)
    return tuple(
        Comparison(Problem("GRU", 32, steps=steps, batch=4), rivals, timed=steps <= 4096, rounds=5) for steps in lengths
    )


def _exact() -> tuple[Comparison, ...]:
    engine = ("exact", "all hops", "all hops, exact inside")
    steps = ("exact, C = 1", "all hops, C = 1")
    base = Problem("leaky tanh", 64, steps=512, segment=256, batch=8)
    sizes = (
        base,
        base._replace(batch=1, segment=128),
        base._replace(features=128, batch=1),
    )
    return (
        *(Comparison(problem, (REFERENCE, HOISTED, *engine)) for problem in sizes),
        # Against single steps, short sequences: they are slow.
        *(
            Comparison(problem._replace(steps=64, segment=16), (REFERENCE, *engine, *steps), rounds=5)
            for problem in sizes
        ),
        Comparison(
            base._replace(steps=32, batch=1, segment=16), (REFERENCE, "exact", "exact, C = 1", "jacfwd"), rounds=5
        ),
    )


def _rank() -> tuple[Comparison, ...]:
    rivals = ("hops=0", REFERENCE, HOISTED, "hops=0, rank 1", "hops=0, rank 4", "hops=0, rank 8")
    gated = ("GRU", "LSTM", "OptimizedLSTM")
    problems = [Problem(cell, 128) for cell in ("leaky tanh", *gated, "LRU", "ALIF")]
    problems += [Problem(cell, 128, gate_bias=3) for cell in gated]
    return tuple(Comparison(problem, rivals, reference="hops=0") for problem in problems)


def _projected() -> tuple[Comparison, ...]:
    ranks = ("R = 1", "R = 2", "R = 4", "R = 8")
    factors = ("R = 2, q = 8", "R = 4, q = 4", "R = 4, q = 8", "R = 8, q = 8")
    bases = [Problem(cell, 128, batch=batch, segment=32) for batch in (16, 1) for cell in ("GRU", "leaky tanh")]
    longer = [base._replace(segment=steps) for base in bases[:2] for steps in (64, 128)]
    return (
        *(
            Comparison(base, (REFERENCE, HOISTED, *ranks, *factors, "R = 4, and its basis", "R = 4, and a meter"))
            for base in bases
        ),
        *(Comparison(base, (REFERENCE, *ranks[2:])) for base in longer),
        Comparison(Problem("GRU", 32, batch=4, steps=128, segment=8), (REFERENCE, "R = 4", "R = 4, stream")),
    )


def _filtered() -> tuple[Comparison, ...]:
    rivals = ("hops=0", REFERENCE, "all hops", "stream, hops=0", "stream, all hops")
    problems = [Problem(cell, 128, layers=1, batch=b, readout=10) for b in (16, 1) for cell in ("leaky tanh", "ALIF")]
    return tuple(Comparison(problem, rivals, reference="hops=0") for problem in problems)


def _peers() -> tuple[Comparison, ...]:
    wholes = (REFERENCE, HOISTED, *ENGINE, "all hops", "R = 4, q = 8", *PEER)
    recurrent_trace_units = (
        REFERENCE,
        HOISTED,
        "hops=0",
        "stream, hops=0",
        "all hops",
        "memorax RTRL",
        "memorax RTRL, windows",
    )
    return (
        Comparison(Problem("leaky tanh", 256), wholes, rounds=5),
        Comparison(Problem("RTU", 64, inputs=64), recurrent_trace_units, rounds=5),
    )


def _stream() -> tuple[Comparison, ...]:
    rivals = (
        REFERENCE,
        HOISTED,
        "hops=0",
        "stream, hops=0",
        "stream, hops=0, descent",
        "hops=0, C = 1",
    )
    small = Problem("leaky tanh", 32, batch=1, steps=128, segment=16)
    return (
        *(Comparison(Problem("leaky tanh", 128, batch=batch), rivals) for batch in (16, 1)),
        Comparison(Problem("GRU", 128, batch=16), rivals),
        Comparison(small, (REFERENCE, "stream, hops=0", "stream, all hops", "stream, exact")),
    )


def _depth() -> tuple[Comparison, ...]:
    rivals = (REFERENCE, HOISTED, *ENGINE, "hops=0, C = 1")
    base = Problem("GRU", 64, steps=256, layers=4, inputs=64)
    return (
        Comparison(base._replace(scanned=True), rivals),
        Comparison(base, rivals),
        *(
            Comparison(
                base._replace(features=16, inputs=16, batch=4, segment=32, scanned=scanned),
                rivals=(REFERENCE, "all hops", "all hops, C = 1"),
            )
            for scanned in (True, False)
        ),
    )


def _sweep() -> tuple[Comparison, ...]:
    base = Problem("leaky tanh", 128, steps=256)
    changes: dict[str, tuple[int, ...]] = {
        "steps": (128, 512, 1024),
        "features": (32, 64, 256),
        "layers": (1, 4, 8),
        "batch": (1, 4, 64),
        "segment": (8, 16, 32, 128, 256),
    }
    problems = [base, *(base._replace(**{field: size}) for field, sizes in changes.items() for size in sizes)]
    return tuple(Comparison(problem, (REFERENCE, HOISTED, *ENGINE), rounds=5) for problem in problems)


def _compile() -> tuple[Comparison, ...]:
    rivals = (REFERENCE, HOISTED, *ENGINE, "all hops", "exact")
    base = Problem("GRU", 64, steps=256, batch=8)
    problems = [base, *(base._replace(layers=layers) for layers in (1, 4))]
    problems += [base._replace(cell=cell) for cell in ("leaky tanh", "LSTM", "OptimizedLSTM", "LRU", "ALIF")]
    return tuple(Comparison(problem, rivals, timed=False, compiles=5) for problem in problems)


def _gpu() -> tuple[Comparison, ...]:
    # Few: a program takes half a minute to compile there.
    sizes = [("leaky tanh", 128, 16), ("GRU", 128, 16), ("GRU", 512, 64)]
    problems = [Problem(cell, features, batch=batch) for cell, features, batch in sizes]
    return tuple(Comparison(problem, (REFERENCE, HOISTED, *ENGINE)) for problem in problems)


def _million() -> tuple[Comparison, ...]:
    million = Problem("leaky tanh", 64, steps=1_000_000, batch=1, inputs=8)
    return (Comparison(million, ENGINE[:1], rounds=1),)


SWEPT = ("steps", "features", "layers", "batch", "segment")
SUITES: dict[str, Suite] = {
    "acceptance": Suite("Time of a gradient, own-node traces, against BPTT", _acceptance()),
    "exact": Suite("Exact mode and all hops against single steps and forward mode", _exact()),
    "rank": Suite("Own-node traces of low rank, against whole ones", _rank()),
    "projected": Suite("A carry projected along R directions, against BPTT", _projected()),
    "filtered": Suite("Credit through a leaky readout, against own traces alone", _filtered()),
    "peers": Suite("Other libraries that learn forward in time", _peers()),
    "stream": Suite("A gradient after every step", _stream()),
    "depth": Suite("Layers as one stack(cell, depth=L), and written out", _depth()),
    "gpu": Suite("For a GPU", _gpu()),
    "sweep": Suite("Time against the sizes, one changed at a time", _sweep(), "ratio", SWEPT),
    "length": Suite("Temporary memory against the length of the sequence", _length(), "temporary_bytes", ("steps",)),
    "compile": Suite("Compile time", _compile(), "compile_cpu"),
    "million": Suite("A million steps", _million()),
    "machine": Suite("The machine", ()),
}


def only(suite: Suite, text: str) -> Suite:
    """The comparisons of a suite whose title holds ``text``."""
    return suite._replace(comparisons=tuple(found for found in suite.comparisons if text in str(found.problem)))
