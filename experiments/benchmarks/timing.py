"""The alternating timer: every rival once per round, so that a machine that slows down slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Sample(NamedTuple):
    """Seconds of one call: on the wall, and of CPU time of all threads."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Any, Sample]:
    """The result of ``call``, once it is there, and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call())
    return result, Sample(time.perf_counter() - wall, time.process_time() - cpu)


def alternate(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    samples: dict[str, list[Sample]],
    after_each: Callable[[str], None],
) -> None:
    """Time every call once per round, each round starting with another one.

    Args:
      calls: by name; warmed up.
      rounds: how many.
      samples: takes the times as they come, so that an interrupted run keeps them.
      after_each: called with the name after every call.
    """
    names = list(calls)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timed(calls[name])[1])
            after_each(name)
