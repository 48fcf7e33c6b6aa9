"""How many threads a benchmark computes with."""

from __future__ import annotations

import os


def fix_threads(threads: int) -> None:
    """Let this process compute with so many threads; before JAX is imported, which reads it once.

    XLA takes the number of its threads from the processors that the process may run on.
    """
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["NPROC"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
