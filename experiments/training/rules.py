"""The learning rules that the experiments compare: one line each in ``RULES``.

A rule is one way to get a gradient, everything else (data, seeds, optimiser) being the same. What a rule lets a
configuration choose (``segment_length``, ``rank``) are the keyword arguments of its function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepeprop_jax import (
    CarryBasis,
    Cell,
    Feedback,
    LearnerState,
    Observed,
    OnlineLearner,
    carry_basis,
    deep_eprop,
    random_feedback,
    with_basis,
)
from deepeprop_jax.reference import bptt, truncated_bptt
from deepeprop_jax.rules import immediate, kf_rtrl, kronecker_sum, rflo, snap, uoro
from experiments.tasks.targets import LossFn

PyTree = Any


class Rule(NamedTuple):
    """A learning rule for one network and loss.

    Attributes:
      start: ``start(params, carry, x) -> state``: what the rule carries along a stream; x is one step's input.
      piece: ``piece(params, state, xs, targets) -> ((loss, state), grads)``, summed over the piece's steps. The state
        goes on to the next piece, at which params may differ.
      trace_bytes: ``trace_bytes(params, carry, x)``: what the rule carries from step to step besides the network's own
        carry; None for backpropagation, which stores its steps instead.
      period: parameters may change after every multiple of so many steps; None: at the end of the sequence only.
      keep: ``keep(state)``: what the rule has learnt for itself, and goes on with in the next sequence; None for most.
      resume: ``resume(state, kept) -> state``: a new sequence's state with that.
      carry_of: ``carry_of(state)``: the network's carry.
    """

    start: Callable[[PyTree, PyTree, PyTree], PyTree]
    piece: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[tuple[jax.Array, PyTree], PyTree]]
    trace_bytes: Callable[[PyTree, PyTree, PyTree], int | None]
    period: int | None
    keep: Callable[[PyTree], PyTree] = lambda state: None
    resume: Callable[[PyTree, PyTree], PyTree] = lambda state, kept: state
    carry_of: Callable[[PyTree], PyTree] = lambda state: state.carry if isinstance(state, LearnerState) else state

    def gradient(
        self, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, kept: PyTree = None
    ) -> tuple[jax.Array, PyTree]:
        """Loss and gradient of a whole sequence."""
        state = self.start(params, carry, jax.tree.map(lambda leaf: leaf[0], xs))
        state = state if kept is None else self.resume(state, kept)
        (loss, _), grads = self.piece(params, state, xs, targets)
        return loss, grads


def carry_alone(params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
    """The start of a rule that carries nothing but the network's carry."""
    return carry


def backward(network: Cell, loss_fn: LossFn) -> Rule:
    """Backpropagation through time."""
    return Rule(carry_alone, bptt(network, loss_fn), lambda params, carry, x: None, period=None)


def truncated(network: Cell, loss_fn: LossFn, chunk: int) -> Rule:
    """Backpropagation inside consecutive chunks of steps."""
    return Rule(carry_alone, truncated_bptt(network, loss_fn, chunk), lambda params, carry, x: None, period=chunk)


def trace_bytes_of(learner: OnlineLearner) -> Callable[[PyTree, PyTree, PyTree], int]:
    """See ``Rule``."""

    def trace_bytes(params: PyTree, carry: PyTree, x: PyTree) -> int:
        state = jax.eval_shape(learner.init, params, carry, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.traces))

    return trace_bytes


def online(
    network: Cell,
    loss_fn: LossFn,
    *,
    # Every step moves the traces: sequences this short would be one segment, which goes back through its steps.
    segment_length: int = 1,
    within_segment: str = "eprop",
    **options: Any,
) -> Rule:
    """Forward in time, by traces; ``options`` are those of ``deep_eprop``."""
    learner = deep_eprop(network, **options)
    run = learner.value_and_grad(loss_fn, segment_length=segment_length, within_segment=within_segment)

    return Rule(learner.init, run, trace_bytes_of(learner), period=segment_length)


def beside(network: Cell, loss_fn: LossFn, *, rule: Callable[..., OnlineLearner], **options: Any) -> Rule:
    """A rule of ``deepeprop_jax.rules``; one that draws goes on with its draws in the next sequence."""
    learner = rule(network, **options)

    def keep(state: LearnerState) -> PyTree:
        return jax.tree.map(jax.random.key_data, {name: memory.keys for name, memory in state.pending.update.items()})

    def resume(state: LearnerState, kept: PyTree) -> LearnerState:
        keys = jax.tree.map(jax.random.wrap_key_data, kept)
        traces = {name: memory._replace(keys=keys[name]) for name, memory in state.pending.update.items()}
        return state._replace(traces=traces, pending=state.pending._replace(update=traces))

    run, trace_bytes = learner.value_and_grad(loss_fn), trace_bytes_of(learner)
    return Rule(learner.init, run, trace_bytes, period=1, keep=keep, resume=resume)


def with_traces(
    network: Cell, loss_fn: LossFn, *, segment_length: int = 1, rank: int | None = None, **options: Any
) -> Rule:
    """``online``, of which a configuration chooses the segments' length and the traces' rank."""
    return online(network, loss_fn, segment_length=segment_length, rank=rank, **options)


class Projecting(NamedTuple):
    """A learner's state, the basis of its projected carry, and what the sequence of this number has shown for it."""

    state: LearnerState
    basis: CarryBasis
    observed: Observed
    sequence: jax.Array


def by_single_steps(learner: OnlineLearner, loss_fn: LossFn) -> Callable[..., PyTree]:
    """As ``learner.value_and_grad`` gives it, from ``learner.step`` and ``learner.gradient`` of every step."""

    def run(params: PyTree, state: LearnerState, xs: PyTree, targets: PyTree) -> PyTree:
        def one(so_far: PyTree, at: PyTree) -> tuple[PyTree, jax.Array]:
            state, y = learner.step(params, so_far[0], at[0])
            loss, dy = jax.value_and_grad(loss_fn)(y, at[1])
            return (state, optax.tree.add(so_far[1], learner.gradient(params, state, dy))), loss

        (state, grads), losses = jax.lax.scan(one, (state, optax.tree.zeros_like(params)), (xs, targets))
        return (losses.sum(), state), grads

    return run


def projected(
    network: Cell,
    loss_fn: LossFn,
    *,
    carry_rank: int,
    carry_factor: int | None = None,
    own_traces: bool = False,
    stepwise: bool = False,
    segment_length: int = 8,
) -> Rule:
    """A carry projected along few directions, which are learnt from every fourth sequence.

    Args:
      stepwise: whether every step has its own gradient, and the carry is projected once in ``segment_length`` of them.
    """
    options: dict[str, Any] = {"project_every": segment_length} if stepwise else {}
    learner = deep_eprop(network, carry_rank=carry_rank, carry_factor=carry_factor, own_traces=own_traces, **options)
    segments = learner.value_and_grad(loss_fn, segment_length=segment_length)
    run = by_single_steps(learner, loss_fn) if stepwise else segments
    basis_learner = carry_basis(learner, loss_fn, segment_length=segment_length, rate=0.1)

    def begin(state: LearnerState, basis: CarryBasis, sequence: jax.Array) -> Projecting:
        key = jax.random.fold_in(jax.random.key(1), sequence)

        def anew() -> Observed:
            return basis_learner.begin(basis, key, state.carry)

        shapes = jax.eval_shape(anew)._replace(key=None)
        nothing = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), shapes)._replace(key=key)
        return Projecting(state, basis, jax.lax.cond(sequence % 4 == 0, anew, lambda: nothing), sequence)

    def start(params: PyTree, carry: PyTree, x: PyTree) -> Projecting:
        basis = basis_learner.init(jax.random.key(0), params, carry, x)
        return begin(learner.init(params, carry, x), basis, jnp.full((), -1, jnp.int32))

    def piece(params: PyTree, now: Projecting, xs: PyTree, targets: PyTree) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        (loss, after), grads = run(params, with_basis(now.state, now.basis), xs, targets)
        observed = jax.lax.cond(
            now.sequence % 4 == 0,
            lambda: basis_learner.observe(now.observed, params, now.state, xs, targets),
            lambda: now.observed,
        )
        return (loss, now._replace(state=after, observed=observed)), grads

    def keep(now: Projecting) -> tuple[CarryBasis, jax.Array]:
        seen = now.observed.boundaries > 0
        basis = jax.lax.cond(seen, lambda: basis_learner.choose(now.basis, now.observed), lambda: now.basis)
        return basis, now.sequence

    return Rule(
        start,
        piece,
        trace_bytes_of(learner),
        period=segment_length,
        keep=keep,
        resume=lambda now, kept: begin(now.state, kept[0], kept[1] + 1),
        carry_of=lambda now: now.state.carry,
    )


def randomly_fed_back(network: Cell, loss_fn: LossFn, *, segment_length: int = 1) -> Rule:
    """Deep e-prop whose signal reaches the highest recurrent layer by random weights, in place of those of the readout
    (Lillicrap et al. 2016); it goes on down as ever."""

    def made(params: PyTree, carry: PyTree, x: PyTree) -> tuple[OnlineLearner, dict[str, Feedback]]:
        everywhere = random_feedback(jax.random.key(2), network, params, carry, x)
        name = list(everywhere)[-1]
        return deep_eprop(network, signals=(name,)), {name: everywhere[name]}

    def start(params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        return made(params, carry, x)[0].init(params, carry, x)

    def piece(
        params: PyTree, state: LearnerState, xs: PyTree, targets: PyTree
    ) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        learner, signals = made(params, state.carry, jax.tree.map(lambda leaf: leaf[0], xs))
        run = learner.value_and_grad(loss_fn, segment_length=segment_length, signals=signals)
        return run(params, state, xs, targets)

    def trace_bytes(params: PyTree, carry: PyTree, x: PyTree) -> int:
        return trace_bytes_of(made(params, carry, x)[0])(params, carry, x)

    return Rule(start, piece, trace_bytes, period=segment_length)


def all_but_lowest(params: tuple) -> tuple:
    """A mask for ``trainable``: every parameter except those of a stack's lowest layer."""
    return tuple(jax.tree.map(lambda _, keep=index > 0: keep, layer) for index, layer in enumerate(params))


def only_highest(params: tuple) -> tuple:
    """A mask for ``trainable``: the parameters of a stack's highest layer alone."""
    highest = len(params) - 1
    return tuple(jax.tree.map(lambda _, keep=index == highest: keep, layer) for index, layer in enumerate(params))


RULES: dict[str, Callable[..., Rule]] = {
    "BPTT": backward,
    "TBPTT(1)": partial(truncated, chunk=1),
    "TBPTT(10)": partial(truncated, chunk=10),
    "TBPTT(50)": partial(truncated, chunk=50),
    "exact RTRL": partial(with_traces, exact=True),
    "deep e-prop": with_traces,
    "hops = 1": partial(with_traces, hops=1),
    "hops = 0": partial(with_traces, hops=0),
    "immediate only": partial(beside, rule=immediate),
    "SnAp-1": partial(beside, rule=snap, order=1),
    "SnAp-2": partial(beside, rule=snap, order=2),
    "UORO": partial(beside, rule=uoro),
    "KF-RTRL": partial(beside, rule=kf_rtrl),
    "OK": partial(beside, rule=kronecker_sum),
    "RFLO": partial(beside, rule=rflo),
    "e-prop in segments": partial(with_traces, segment_length=32),
    "exact in segments": partial(with_traces, segment_length=32, within_segment="exact"),
    **{f"R = {rank}": partial(projected, carry_rank=rank) for rank in (1, 2, 4, 8)},
    **{f"R = {rank}, own traces": partial(projected, carry_rank=rank, own_traces=True) for rank in (1, 2, 4, 8)},
    "R = 4, q = 8": partial(projected, carry_rank=4, carry_factor=8),
    "R = 4, step by step": partial(projected, carry_rank=4, stepwise=True),
    "random feedback": randomly_fed_back,
    "lower frozen": partial(with_traces, trainable=all_but_lowest),
    # The readout has no carry, and so no traces.
    "readout only": lambda network, loss_fn: online(network, loss_fn, trainable=only_highest),
}
