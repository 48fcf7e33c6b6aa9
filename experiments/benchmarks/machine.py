"""What the machine gives: multiply-adds in a matrix product, and bytes to and from memory, per second."""

from __future__ import annotations

import os
import platform
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import timed

GEMM_SIZES = ((1024, 1024, 1024), (16, 128, 128), (1, 128, 128))
BANDWIDTH_NUMBERS = 2**25


def clock() -> str:
    """Which time the ratios are of: CPU time where the CPU computes, wall time elsewhere."""
    return "cpu" if jax.default_backend() == "cpu" else "wall"


def measure(rounds: int, gemm_sizes: tuple = GEMM_SIZES, numbers: int = BANDWIDTH_NUMBERS) -> dict[str, Any]:
    """Rates of this machine with the threads that this process may use, best of ``rounds`` runs.

    Returns:
      ``gemm``: multiply-adds per second of a float32 product (m, k) × (k, n) by its size; ``bandwidth``: bytes per
      second of x + 1 over an array larger than any cache, read and written; and what the machine is.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "clock": clock(),
        "gemm": {"x".join(map(str, size)): _gemm_rate(*size, rounds) for size in gemm_sizes},
        "bandwidth": _bandwidth(numbers, rounds),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _best_seconds(call: Any, rounds: int) -> float:
    jax.block_until_ready(call())
    return min(getattr(timed(call)[1], clock()) for _ in range(rounds))


def _gemm_rate(m: int, k: int, n: int, rounds: int) -> float:
    """As in a time loop: each product needs the one before, and the weights stay where they are."""
    repeats = max(1, 2**28 // (m * k * n))
    weights = jax.random.normal(jax.random.key(0), (k, n)) / k**0.5

    @jax.jit
    def products(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: x @ weights, x)

    x = jnp.ones((m, k))
    return repeats * m * k * n / _best_seconds(lambda: products(x, weights), rounds)


def _bandwidth(numbers: int, rounds: int) -> float:
    passes = 4
    x = jnp.zeros(numbers, jnp.float32)
    size = x.nbytes
    # In place, x given away: fresh pages from the operating system would cost more than the memory itself.
    add_one = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x), donate_argnums=0)

    def call() -> jax.Array:
        nonlocal x
        x = add_one(x)
        return x

    return passes * 2 * size / _best_seconds(call, rounds)
