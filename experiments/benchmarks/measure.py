"""One comparison: a problem, its rivals, all compiled, checked against BPTT and timed in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.cost_model import cost
from experiments.benchmarks.problems import Problem
from experiments.benchmarks.rivals import RIVALS, Rival, missing
from experiments.benchmarks.timing import Sample, alternate, timed
from experiments.training.against_bptt import compare_layers

REFERENCE = "BPTT"
HOISTED = "BPTT, hoisted"

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


class Comparison(NamedTuple):
    """What a suite is made of.

    Attributes:
      problem: the network and its sequences.
      rivals: names from ``RIVALS``.
      reference: the one whose gradient the others' is compared with, named before them.
      timed: whether to run, or only to compile (for time, memory and compile time against sizes beyond reach).
      rounds: fewer rounds than asked for, where one run is long.
      compiles: how often to compile, all rivals in turn.
    """

    problem: Problem
    rivals: tuple[str, ...]
    reference: str = REFERENCE
    timed: bool = True
    rounds: int | None = None
    compiles: int = 1


def calls_of(comparison: Comparison, rounds: int) -> int:
    """How often ``on_progress`` will be called."""
    timed_rounds = (comparison.rounds or rounds) if comparison.timed else 0
    return len(comparison.rivals) * (comparison.compiles + timed_rounds)


def compare(comparison: Comparison, rounds: int, record: dict[str, Any], on_progress: Callable[[str], None]) -> None:
    """Measure every rival; ``record`` fills up on the way, so that an interrupted run keeps what it has.

    ``record["rivals"][name]`` gets ``compile_cpu`` and ``compile_wall`` (seconds to analyse, lower and compile),
    ``temporary_bytes`` and ``state_bytes`` (what a stream goes on from), ``multiply_adds`` and ``bytes`` per step by
    the cost model, ``errors`` (relative error of every layer's gradient to the reference's), ``wall`` and ``cpu``
    (seconds, a number per round); or ``missing``, why there is nothing. ``record["peak_bytes"]`` is the most that the
    process has held so far, data included.
    """
    problem = comparison.problem
    rivals = record.setdefault("rivals", {})
    record.update(problem=problem._asdict(), title=str(problem), reference=comparison.reference)
    made: dict[str, tuple[Rival, Any]] = {}
    for _ in range(comparison.compiles):
        for name in comparison.rivals:
            entry = rivals.setdefault(name, {})
            reason = missing(name, problem)
            if reason is None:
                made[name], sample = timed(partial(_compile, name, problem))
                entry.setdefault("compile_cpu", []).append(sample.cpu)
                entry.setdefault("compile_wall", []).append(sample.wall)
                entry.update(_bytes_of(made[name][1]))
            else:
                entry["missing"] = reason
            on_progress(f"{name}: compiling")
    for name in made:
        modelled = cost(name, problem)
        rivals[name].update({} if modelled is None else modelled._asdict())
    if comparison.timed:
        _run(made, comparison, comparison.rounds or rounds, rivals, on_progress)
    if resource is not None:
        kilobytes = sys.platform != "darwin"
        record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def _run(
    made: dict[str, tuple[Rival, Any]],
    comparison: Comparison,
    rounds: int,
    rivals: dict[str, dict],
    on_progress: Callable[[str], None],
) -> None:
    """Gradient errors from the warm-up call, then the times."""
    calls: dict[str, Callable[[], Any]] = {}
    reference = None
    for name, (rival, executable) in made.items():
        calls[name] = partial(executable, *rival.arguments(comparison.problem))
        _, grads, _ = jax.block_until_ready(calls[name]())
        reference = grads if name == comparison.reference else reference
        if reference is not None and rival.gives_gradient:
            rivals[name]["errors"] = [layer["relative_error"] for layer in compare_layers(grads, reference)]
    samples: dict[str, list[Sample]] = {name: [] for name in calls}

    def keep(name: str) -> None:
        found = samples[name]
        rivals[name].update(wall=[sample.wall for sample in found], cpu=[sample.cpu for sample in found])
        on_progress(name)

    alternate(calls, rounds, samples, keep)


def _compile(name: str, problem: Problem) -> tuple[Rival, Any]:
    rival = RIVALS[name](problem)
    shapes = jax.eval_shape(lambda: rival.arguments(problem))
    return rival, jax.jit(rival.run).lower(*shapes).compile()


def _bytes_of(executable: Any) -> dict[str, int]:
    end = jax.tree.leaves(executable.out_info[2])
    return {
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in end),
    }
