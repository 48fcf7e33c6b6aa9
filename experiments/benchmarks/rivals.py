"""The rivals: name -> how the gradient of a problem is computed.

Each is a pure function ``run(params, start, xs, targets) -> (loss, grads, end)``. ``end`` is what a stream would go on
from, and a result, so that no compiler drops the traces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax import OnlineLearner, carry_basis, deep_eprop, error_meter, hoisted_bptt, with_basis
from deepeprop_jax.reference import bptt, checkpointed_bptt, forward_rtrl, truncated_bptt
from experiments.benchmarks import peer
from experiments.benchmarks.problems import Problem, squared_error

STREAM_RATE = 1e-6


class Rival(NamedTuple):
    """One way to the gradient.

    Attributes:
      run: ``run(params, start, xs, targets) -> (loss, grads, end)``.
      start: ``start(params, carry, xs) -> start``: the carry, or a learner's state.
      gives_gradient: whether ``grads`` is the gradient at ``params`` (it is not where they change on the way).
    """

    run: Callable[..., Any]
    start: Callable[..., Any] = lambda params, carry, xs: carry
    gives_gradient: bool = True

    def arguments(self, problem: Problem) -> tuple:
        """What ``run`` takes."""
        params, carry, xs, targets = problem.data()
        return params, self.start(params, carry, xs), xs, targets


def _backward(make: Callable[..., Any], problem: Problem, **options: Any) -> Rival:
    compute = make(problem.network(), squared_error, **options)

    def run(params: Any, carry: Any, xs: Any, targets: Any) -> tuple:
        (loss, end), grads = compute(params, carry, xs, targets)
        return loss, grads, end

    return Rival(run)


def _hoisted(problem: Problem) -> Rival:
    return _backward(lambda network, loss_fn: hoisted_bptt(network)(loss_fn), problem)


def _started(learner: OnlineLearner, run: Callable[..., Any], **options: Any) -> Rival:
    return Rival(run, lambda params, carry, xs: learner.init(params, carry, xs[0]), **options)


def _segments(problem: Problem, within: str = "eprop", length: int | None = None, **options: Any) -> Rival:
    """The engine: segments of C steps."""
    learner = deep_eprop(problem.network(), **options)
    compute = learner.value_and_grad(squared_error, segment_length=length or problem.segment, within_segment=within)

    def run(params: Any, state: Any, xs: Any, targets: Any) -> tuple:
        (loss, state), grads = compute(params, state, xs, targets)
        # All else in the state is a copy of an argument.
        return loss, grads, (state.carry, state.traces)

    return _started(learner, run)


def _stream(problem: Problem, descend: bool = False, **options: Any) -> Rival:
    """A step and its gradient, one after the other: the gradients are summed, or each taken as a step of descent."""
    learner = deep_eprop(problem.network(), **options)
    loss_and_dy = jax.value_and_grad(squared_error)

    def run(params: Any, state: Any, xs: Any, targets: Any) -> tuple:
        def body(loop: tuple, inputs: tuple) -> tuple[tuple, None]:
            state, loss, sums = loop
            x, target = inputs
            now = sums if descend else params
            state, y = learner.step(now, state, x)
            value, dy = loss_and_dy(y, target)
            grads = learner.gradient(now, state, dy)
            scale = -STREAM_RATE if descend else 1
            return (state, loss + value, jax.tree.map(lambda a, g: a + scale * g, sums, grads)), None

        sums = params if descend else jax.tree.map(jnp.zeros_like, params)
        (state, loss, sums), _ = jax.lax.scan(body, (state, jnp.zeros(()), sums), (xs, targets))
        return loss, sums, (state.carry, state.traces)

    return _started(learner, run, gives_gradient=not descend)


def _learning_its_basis(problem: Problem, rank: int) -> Rival:
    """A projected carry, and an update of its basis from the same sequence."""
    learner = deep_eprop(problem.network(), carry_rank=rank)
    compute = learner.value_and_grad(squared_error, segment_length=problem.segment)
    update = carry_basis(learner, squared_error, segment_length=problem.segment)

    def run(params: Any, start: Any, xs: Any, targets: Any) -> tuple:
        state, basis = start
        (loss, after), grads = compute(params, with_basis(state, basis), xs, targets)
        basis = update.update(basis, jax.random.key(0), params, state, xs, targets)
        return loss, grads, (after.carry, after.traces, basis)

    def start(params: Any, carry: Any, xs: Any) -> tuple:
        return learner.init(params, carry, xs[0]), update.init(jax.random.key(0), params, carry, xs[0])

    return Rival(run, start)


def _metered(problem: Problem, **options: Any) -> Rival:
    """With the error of the gradient measured beside it."""
    learner = deep_eprop(problem.network(), **options)
    compute = learner.value_and_grad(squared_error, segment_length=problem.segment)
    meter_of = error_meter(learner, squared_error)

    def run(params: Any, start: Any, xs: Any, targets: Any) -> tuple:
        state, meter = start
        (loss, after), grads = compute(params, state, xs, targets)
        meter = meter_of.update(meter, params, state, xs, targets, grads)
        return loss, grads, (after.carry, after.traces, meter)

    def start(params: Any, carry: Any, xs: Any) -> tuple:
        return learner.init(params, carry, xs[0]), meter_of.init(jax.random.key(0), params, carry, xs[0])

    return Rival(run, start)


RIVALS: dict[str, Callable[[Problem], Rival]] = {
    "BPTT": partial(_backward, bptt),
    "BPTT, hoisted": _hoisted,
    "BPTT, checkpointed": lambda problem: _backward(checkpointed_bptt, problem, segment_length=problem.segment),
    "BPTT, truncated": lambda problem: _backward(truncated_bptt, problem, k=problem.segment),
    "jacfwd": partial(_backward, forward_rtrl),
    "hops=0": partial(_segments, hops=0),
    "hops=0, exact inside": partial(_segments, within="exact", hops=0),
    **{f"hops=0, rank {rank}": partial(_segments, hops=0, rank=rank) for rank in (1, 4, 8)},
    **{f"R = {rank}": partial(_segments, carry_rank=rank) for rank in (1, 2, 4, 8)},
    **{
        f"R = {r}, q = {q}": partial(_segments, carry_rank=r, carry_factor=q)
        for r, q in ((2, 8), (4, 4), (4, 8), (8, 8))
    },
    "R = 4, and its basis": partial(_learning_its_basis, rank=4),
    "R = 4, and a meter": partial(_metered, carry_rank=4),
    "R = 4, stream": partial(_stream, carry_rank=4),
    "all hops": _segments,
    "all hops, exact inside": partial(_segments, within="exact"),
    "exact": partial(_segments, exact=True),
    "hops=0, C = 1": partial(_segments, length=1, hops=0),
    "all hops, C = 1": partial(_segments, length=1),
    "exact, C = 1": partial(_segments, length=1, exact=True),
    "stream, hops=0": partial(_stream, hops=0),
    "stream, hops=0, descent": partial(_stream, descend=True, hops=0),
    "stream, all hops": _stream,
    "stream, exact": partial(_stream, exact=True),
    "braintrace D_RTRL": lambda problem: Rival(peer.by_braintrace(problem, "d_rtrl")),
    "braintrace D_RTRL, windows": lambda problem: Rival(peer.by_braintrace(problem, "d_rtrl", windows=True)),
    "braintrace ES_D_RTRL": lambda problem: Rival(peer.by_braintrace(problem, "es_d_rtrl", decay_or_rank=0.9)),
    "memorax RTRL": lambda problem: Rival(*peer.by_memorax(problem, 1)),
    "memorax RTRL, windows": lambda problem: Rival(*peer.by_memorax(problem, problem.segment)),
}


def missing(name: str, problem: Problem) -> str | None:
    """Why a rival cannot run here; None where it can."""
    library = name.split(" ")[0]
    return peer.missing(library, problem) if library in peer.LIBRARIES else None
