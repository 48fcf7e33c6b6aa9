"""The cost model: multiply-adds, and bytes that must move, per step, from the sizes alone.

A dense cell uses each of its |θ| weights once per step and example, so that a forward pass is B|θ| multiply-adds, and
BPTT three times as many. P is the number of trace numbers of one example: Σ K|θ| of the layers for own-node traces with
local rows (K carry slots), n_v |θ_k| for each pair of layers whose rows are dense, as ``learner.init`` holds them.

    BPTT                3 B|θ|                              8|θ| bytes: the gradient's sum, in and out of the loop
    hoisted             3 B|θ|                              none
    e-prop, segments    3 B|θ| + B P (1 + (K + 1) / C)      (12 B P + 8|θ|) / C: read, read and write a trace
    exact, segments     3 B|θ| + 2 B P + B P (N + 1) / C    (12 B P + 8|θ|) / C
    stream              as in segments, with C = 1

N is the length of all carries. In segments of exact mode, the cotangents of all N carry components go backward through
every step (B P multiply-adds, as each reaches every weight once), and their outer products make the traces (B P more);
at the boundary M · S_start takes N per trace number. Cross-node traces of e-prop are dense, but a unit vector stays in
its unit until it meets the layer below, as a row of the weights: they cost their outer products alone, and M is
block-diagonal for them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax

from deepeprop_jax import deep_eprop
from experiments.benchmarks.problems import Problem

FLOAT_BYTES = 4
OPTIONS: dict[str, dict[str, Any]] = {"hops=0": {"hops": 0}, "all hops": {}, "exact": {"exact": True}}


class Cost(NamedTuple):
    """Per step of the whole batch."""

    multiply_adds: float
    bytes: float


def cost(rival: str, problem: Problem) -> Cost | None:
    """The model's figures; None for rivals that it does not cover."""
    params, carry, _, _ = jax.eval_shape(problem.data)
    weights = sum(_reals(leaf) for leaf in jax.tree.leaves(params))
    forward = problem.batch * weights
    if rival.startswith("BPTT"):
        passes = 4 if "checkpointed" in rival else 3
        return Cost(passes * forward, 0 if "hoisted" in rival else 2 * FLOAT_BYTES * weights)
    if rival == "jacfwd":
        return Cost(forward * (1 + weights), 0)
    mode = rival.removeprefix("stream, ").split(",")[0]
    if mode not in OPTIONS or "rank" in rival:
        return None
    by_steps = rival.startswith("stream") or rival.endswith("C = 1")
    length = 1 if by_steps else problem.segment
    own, cross, slots = _trace_numbers(problem._replace(steps=1, batch=1, segment=1), mode)
    components = sum(_reals(leaf) for leaf in jax.tree.leaves(carry)) // problem.batch
    if mode == "exact" and slots is None:
        inside, boundary = 2 * (own + cross), (own + cross) * (components + 1)
    else:
        inside, boundary = own + cross, (own + cross) * ((slots or 1) + 1)
    adds = 3 * forward + problem.batch * (inside + boundary / length)
    return Cost(adds, 3 * FLOAT_BYTES * problem.batch * (own + cross) / length + 2 * FLOAT_BYTES * weights / length)


def _reals(leaf: Any) -> int:
    return leaf.size * (2 if jax.numpy.issubdtype(leaf.dtype, jax.numpy.complexfloating) else 1)


@functools.lru_cache
def _trace_numbers(problem: Problem, mode: str) -> tuple[int, int, int | None]:
    """Own-node and cross-node trace numbers of a problem of batch 1, and K where all own-node rows are local."""
    learner = deep_eprop(problem.network(), **OPTIONS[mode])
    params, carry, xs, _ = jax.eval_shape(problem.data)
    x = jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype)
    traces = jax.eval_shape(learner.init, params, carry, x).traces
    own = cross = 0
    rows = []
    for name, value in traces.items():
        node, source = name.split(" <- ")
        leaves = jax.tree.leaves(value)
        size = sum(leaf.size for leaf in leaves)
        if node == source:
            # (batch, rows, columns), behind an axis of layers where the node has depth
            own, rows = own + size, rows + [leaf.shape[-2] for leaf in leaves]
        else:
            cross += size
    slots = max(rows, default=0)
    return own, cross, slots if slots < problem.features else None
