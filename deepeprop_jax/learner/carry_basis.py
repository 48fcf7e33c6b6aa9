"""The basis of a projected carry, learnt online: from a learner's own segments, without BPTT and without a future."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr.batched import Leaves, Lifted
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.balanced_truncation import of_roots
from deepeprop_jax.learner.basis import (
    BasisLearner,
    BeginToObserve,
    CarryBasis,
    Choose,
    InitBasis,
    Observe,
    Observed,
    UpdateBasis,
)
from deepeprop_jax.learner.contract import OnlineLearner, documented_by
from deepeprop_jax.learner.second_moments import kind_for, kind_of
from deepeprop_jax.learner.sequence import Sequence as Steps
from deepeprop_jax.learner.sequence import make_sequence
from deepeprop_jax.learner.sharded import with_whole_batches
from deepeprop_jax.learner.signals import Signal, by_index
from deepeprop_jax.learner.tangent import Moving, carry_numbers, no_tangent, push_forward, random_tangent
from deepeprop_jax.network.arguments import as_arrays
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.segments.gradient import as_cotangents
from deepeprop_jax.segments.network import Flow, Segment, prepare
from deepeprop_jax.segments.projected import flow_of, signal
from deepeprop_jax.traces import projected
from deepeprop_jax.traces.plan import Plan


def carry_basis(
    learner: OnlineLearner,
    loss_fn: Callable[..., PyTree],
    *,
    segment_length: int,
    horizons: Sequence[float] = (0.5, 0.75, 0.9, 0.97),
    rate: float = 0.05,
    ridge: float = 1e-6,
    sketch: int | None = None,
    signals: Mapping[str, Signal] | None = None,
) -> BasisLearner:
    """Learn along which directions a carry is to be projected, from what an online learner sees.

    Two second moments decide (see ``balanced_truncation``). Σλ is that of the cotangents at boundaries. Those of a
    segment's own losses come from no further than its end; where later ones will point is estimated by pulls: a random
    cotangent at the segment's end, drawn with the moments Σ_j so far, goes back through the segment's true Jacobian M,

        q = Mᵀ Σ_j^½ z,  z ~ N(0, 1)          Σ_j ← (1 - rate) Σ_j + rate ((1 - g_j) cov(λ) + g_j cov(q))

    for several horizons 1 / (1 - g_j), in segments, at once, and Σλ is their mean; the examples of a batch share them
    out. A pull never passes through U, so directions that were missed are found. Σs is the moment of a tangent S ξ for
    random ξ, centred over the batch, over the boundaries so far where the batch is one example. Every boundary counts
    alike, whatever its size.

    Args:
      learner: from ``deep_eprop(network, carry_rank=R)``.
      loss_fn: as for ``value_and_grad``, without aux.
      segment_length: C, that of the learner's segments.
      horizons: the g_j, in [0, 1).
      rate: how much one call counts; the first ones count more.
      ridge: added to the moments' eigenvalues, in units of their mean.
      sketch: how many random rows, at least R, stand for a moment of N x N numbers, see ``second_moments``: memory and
        time then grow with N and not with N² and N³. None: 128 where N is above 1000, else the whole.
      signals: as for ``value_and_grad``.

    Returns:
      A ``BasisLearner``. Give its basis to a state by ``with_basis``. Where parameters change inside a sequence, give
      its pieces to ``observe``, one after the other, and ``choose`` at its end.

    Raises:
      TypeError, ValueError: an option of a wrong type or out of range; a learner without ``carry_rank``.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from deepeprop_jax import carry_basis, deep_eprop, with_basis
    >>> learner = deep_eprop(nn.GRUCell(features=4), carry_rank=2)
    >>> xs, key = jnp.ones((6, 2, 3), jnp.float32), jax.random.key(0)
    >>> params, carry = learner.network.init(key, xs[0])
    >>> loss_fn = lambda y, target: jnp.mean((y - target) ** 2)
    >>> basis_learner = carry_basis(learner, loss_fn, segment_length=3)
    >>> basis = basis_learner.init(key, params, carry, xs[0])
    >>> state = learner.init(params, carry, xs[0])
    >>> basis = basis_learner.update(basis, key, params, state, xs, jnp.zeros(6))
    >>> state = with_basis(state, basis)
    >>> (loss, state), grads = learner.value_and_grad(loss_fn, segment_length=3)(params, state, xs, jnp.zeros(6))
    """
    checks.check_loss_and_learner(learner, loss_fn)
    checks.check_count("segment_length", segment_length, 1, "an integer >= 1, the steps of a segment")
    if sketch is not None:
        checks.check_count("sketch", sketch, 1, "None or an integer >= 1, the rows of a sketch")
    gains = _gains(horizons)
    numbers = [isinstance(value, int | float) for value in (rate, ridge)]
    if not all(numbers) or not 0 < rate <= 1 or ridge < 0:
        raise ValueError(f"needed 0 < rate <= 1 and ridge >= 0; seen rate={rate!r}, ridge={ridge!r}.")

    @documented_by(InitBasis)
    @with_whole_batches
    def init(key, params, carry, x):
        return _first(learner.plan(params, carry, x), key, len(gains), sketch)

    @documented_by(Observe)
    @with_whole_batches
    def observe(observed, params, state, xs, targets, resets=None, valid=None):
        params, xs = as_arrays(params, "params"), as_arrays(xs, "xs")
        plan = learner.plan(params, state.carry, jax.tree.map(lambda leaf: leaf[0], xs))
        if not _rank(plan):
            return observed
        given = by_index(plan, signals)
        steps = make_sequence(plan, loss_fn, False, state.initial_carry, xs, targets, resets, valid, given)
        return _observe(learner.network, steps, segment_length, observed, params, state.carry)

    @documented_by(Choose)
    def choose(basis, observed):
        return _choose(basis, observed, gains, rate, ridge)

    @documented_by(UpdateBasis)
    @with_whole_batches
    def update(basis, key, params, state, xs, targets, resets=None, valid=None):
        return choose(basis, observe(_begin(basis, key, state.carry), params, state, xs, targets, resets, valid))

    begin = documented_by(BeginToObserve)(with_whole_batches(_begin))
    return BasisLearner(init, update, begin, observe, choose)


def _gains(horizons: Sequence[float]) -> np.ndarray:
    """The g_j, (J,)."""
    try:
        gains = np.asarray(horizons, float)
    except (TypeError, ValueError):
        gains = np.zeros(0)
    if gains.ndim != 1 or not gains.size or not ((gains >= 0) & (gains < 1)).all():
        raise ValueError(f"horizons must be numbers g with 0 <= g < 1, such as (0.5, 0.9); seen {horizons!r}.")
    return gains


def _rank(plan: Plan) -> int:
    if plan.projection is None:
        raise ValueError("The learner has no projected carry; make it by deep_eprop(network, carry_rank=R).")
    return plan.projection.rank


def _first(plan: Plan, key: jax.Array, horizons: int, sketch: int | None) -> CarryBasis:
    """See ``InitBasis``."""
    rank = _rank(plan)
    assert plan.projection is not None
    numbers, dtype = plan.projection.numbers, plan.dtype
    kind = kind_for(numbers, sketch)
    rows = kind.shape(numbers)[0]
    if rows < rank:
        raise ValueError(f"A sketch of {rows} rows cannot tell carry_rank={rank} directions; give at least {rank}.")
    directions = projected.random_basis(key, rank, numbers, dtype)
    unknown = kind.unknown(jax.random.fold_in(key, 1), numbers, dtype)
    signals = jnp.broadcast_to(unknown, (horizons, *unknown.shape))
    lift = jnp.array(directions, copy=True)  # no buffer twice: a state may be donated
    return CarryBasis(directions, lift, jnp.ones(rows, dtype), signals, unknown, jnp.zeros((), jnp.int32))


def _begin(basis: CarryBasis, key: jax.Array, carry: PyTree) -> Observed:
    """See ``BeginToObserve``. Each leaf is an array of its own, so that what is observed may be donated."""
    return Observed(
        key=jnp.copy(key),
        roots=kind_of(basis.signals).roots(basis.signals, 0) / math.sqrt(len(basis.signals)),
        turn=jnp.copy(basis.updates),
        tangent=no_tangent(as_arrays(carry, "carry")),
        mean=jnp.zeros(basis.tangents.shape[-1], basis.tangents.dtype),
        boundaries=jnp.zeros_like(basis.updates),
        own=jnp.zeros_like(basis.tangents),
        pulled=jnp.zeros_like(basis.signals),
        tangents=jnp.zeros_like(basis.tangents),
    )


def _choose(basis: CarryBasis, observed: Observed, gains: np.ndarray, rate: float, ridge: float) -> CarryBasis:
    """Moments and directions, after a sequence."""
    rank, kind, dtype = len(basis.directions), kind_of(basis.tangents), basis.tangents.dtype
    if not rank:
        return basis._replace(updates=basis.updates + 1)
    own, pulled, tangents = map(kind.of_trace_one, (observed.own, observed.pulled, observed.tangents))
    now = jnp.maximum(rate, 1 / (basis.updates + 1)).astype(dtype)
    new = kind.of_trace_one(kind.mixed(own[None], pulled, jnp.asarray(gains, dtype)[:, None, None]))

    def towards(old: jax.Array, new: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(kind.trace(seen)[..., None, None] > 0, kind.mixed(old, new, now), old)

    signals = towards(basis.signals, new, pulled)
    tangents = towards(basis.tangents, tangents, tangents)
    left, right = kind.root_of_mean(signals, ridge), kind.roots(tangents, ridge)
    directions, lift, weights = of_roots(left, right, rank)
    return CarryBasis(directions, lift, weights, signals, tangents, basis.updates + 1)


def _observe(network: Cell, steps: Steps, length: int, observed: Observed, params: PyTree, carry: PyTree) -> Observed:
    """With one piece more."""
    plan, kind, horizons, drawn = steps.plan, kind_of(observed.own), len(observed.roots), observed.roots.shape[-1]
    ready = prepare(plan, params)
    total, batch = jax.tree.leaves(steps.inputs[0])[0].shape[:2]
    whole = min(length, total)
    probe_key, pull_key = jax.random.split(observed.key)
    probe = random_tangent(plan, probe_key, params)

    def segment(loop: tuple[PyTree, Observed], index: jax.Array, length: int) -> tuple[tuple[PyTree, Observed], None]:
        carry, seen = loop
        cut = partial(lax.dynamic_slice_in_dim, start_index=index * whole, slice_size=length)
        xs, targets, flags = jax.tree.map(cut, steps.inputs)
        part = Segment(ready, carry, steps.initial_carry, xs, flags)
        _, dy = steps.losses_and_dy(part.outputs, targets, flags.valid)
        leaves: Leaves = [Lifted(leaf, "cb") for leaf in plan.output.split_cotangent(dy)]
        given = steps.given(dy, targets, flags.valid)
        own = signal(part, Flow(part, leaves, exact=True, given=as_cotangents(plan, given)), "b")  # λ
        horizon = (jnp.arange(batch, dtype=index.dtype) + seen.boundaries + seen.turn) % horizons
        here = jax.random.fold_in(pull_key, seen.boundaries)
        noise, keys = jax.random.normal(here, (batch, drawn), plan.dtype), jax.random.split(here, 3)
        after = part.after_resets()
        pulled = signal(after, flow_of(after, jnp.einsum("bnm,bm->bn", seen.roots[horizon], noise), "b"), "rb")[0]  # q
        of_horizon = [jnp.where((horizon == j)[:, None], pulled, 0) for j in range(horizons)]
        numbers = carry_numbers(plan, seen.tangent)
        centred = numbers - (numbers.mean(0) if batch > 1 else seen.mean)[None]
        start = Moving(carry, seen.tangent)
        inputs = xs, targets, flags
        seen = seen._replace(
            tangent=push_forward(network, params, probe, start, steps.initial_carry, inputs).moving.tangent,
            mean=seen.mean + (numbers[0] - seen.mean) / (seen.boundaries + 1).astype(plan.dtype),
            boundaries=seen.boundaries + 1,
            own=seen.own + kind.of(keys[0], own),
            pulled=seen.pulled + jnp.stack([kind.of(keys[1], q) for q in of_horizon]),
            tangents=seen.tangents + kind.of(keys[2], centred),
        )
        return (part.carry_end, seen), None

    indices = jnp.arange(total // whole, dtype=observed.boundaries.dtype)
    loop, _ = lax.scan(partial(segment, length=whole), (carry, observed), indices)
    if total % whole:  # the loss of a whole sequence may be there
        loop, _ = segment(loop, jnp.asarray(total // whole, indices.dtype), total % whole)
    return loop[1]
