"""Own traces of low rank: of full rank they are the trace; below it little more is lost than must be, and shown."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import analyse, compare_to_bptt, deep_eprop, stack, trace_error
from deepeprop_jax.report.cost import tree_bytes
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces import low_rank
from deepeprop_jax.traces.low_rank import Layout, LowRank
from tests.gradients import FLOAT64, assert_same_gradient
from tests.segments.test_segment import STEPS, flags_of
from tests.zoo import cells, problem

FULL = 1000
"""More directions than any trace here has."""


def slow_gates(params):
    """Biases of the update and forget gates at +3: traces that remember."""

    def move(path, leaf):
        keys = {getattr(key, "key", None) for key in path}
        return leaf + 3 if keys & {"iz", "hf"} and "bias" in keys else leaf

    return jax.tree_util.tree_map_with_path(move, params)


def run_both(name: str, hops: int | None, flags: Flags, rank: int = FULL, change=lambda params: params):
    p = problem(name, steps=STEPS)
    params, found = change(p.params), []
    for r in (None, rank):
        learner = deep_eprop(p.network, hops=hops, rank=r)
        state = learner.init(params, p.carry, jax.tree.map(lambda leaf: leaf[0], p.xs))
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=3))
        (_, state), grads = run(params, state, p.xs, p.targets, flags.resets, flags.valid)
        found.append((grads, state))
    return found


@pytest.mark.parametrize(
    ("name", "hops", "kind"),
    [
        ("stack_2", None, "random"),
        ("alif_refractory", 0, "none"),
        ("lru", 0, "none"),
        ("depth_4", None, "random"),
        pytest.param("depth_4", 1, "random", marks=pytest.mark.slow),
        pytest.param("depth_4_below_recurrent", None, "random", marks=pytest.mark.slow),
        pytest.param("stack_3", None, "random", marks=pytest.mark.slow),
    ],
)
def test_full_rank_equals_no_rank(name, hops, kind):
    (needed, _), (seen, state) = run_both(name, hops, flags_of(kind), change=slow_gates)
    assert trace_error(state)
    assert_same_gradient(seen, needed, FLOAT64, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [*cells(), "depth_4_lstm", "depth_4_between", "depth_4_below_recurrent"])
def test_full_rank_equals_no_rank_for_every_cell(name):
    (needed, _), (seen, _) = run_both(name, 0, flags_of("random"), change=slow_gates)
    assert_same_gradient(seen, needed, FLOAT64, name)


class Network(NamedTuple):
    learner: object
    params: object
    carry: object
    xs: jax.Array
    targets: jax.Array


def gru(rank: int | None, steps: int = 24, **options) -> Network:
    learner = deep_eprop(stack(nn.GRUCell(features=9)), rank=rank, **options)
    xs = jax.random.normal(jax.random.key(1), (steps, 3, 5))
    params, carry = learner.network.init(jax.random.key(0), xs[0])
    params, carry = jax.tree.map(lambda leaf: leaf.astype(xs.dtype), (params, carry))
    return Network(learner, params, carry, xs, jax.random.normal(jax.random.key(2), (steps, 3, 9)))


def squared_error(y, target):
    return jnp.sum((y - target) ** 2)


@pytest.mark.mixed_promotion
def test_more_rank_is_less_error_and_the_state_says_how_much():
    """The trace's true error, of both factors multiplied out, beside the estimate; the gradient follows it."""
    whole = gru(None, hops=0)
    state = whole.learner.init(whole.params, whole.carry, whole.xs[0])
    run = jax.jit(whole.learner.value_and_grad(squared_error, segment_length=4))
    (_, exact), needed = run(whole.params, state, whole.xs, whole.targets)
    every, gradient_errors = whole.learner.plan(whole.params, whole.carry, whole.xs[0]), []
    for rank in (1, 6):
        n = gru(rank, hops=0)
        plan = n.learner.plan(n.params, n.carry, n.xs[0])
        state = n.learner.init(n.params, n.carry, n.xs[0])
        run = jax.jit(n.learner.value_and_grad(squared_error, segment_length=4))
        (_, state), grads = run(n.params, state, n.xs, n.targets)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(needed), strict=True)
        lost, size = np.sum([(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in pairs], axis=0)
        gradient_errors.append(np.sqrt(lost / size))
        for v, layout in enumerate(plan.low_rank):
            seen = low_rank.multiplied_out(layout, state.traces[plan.low_rank_name(v)])
            full = {b.leaves: x for b, x in zip(every.own[v], exact.traces[plan.name(v, v)], strict=True)}
            pairs = [(full[block.leaves], part) for block, part in zip(layout.blocks, seen, strict=True)]
            lost = sum(jnp.square(a - b).sum(axis=(1, 2)) for a, b in pairs)
            size = sum(jnp.square(a).sum(axis=(1, 2)) for a, _ in pairs)
            true, estimate = jnp.sqrt(lost / size), trace_error(state)[plan.low_rank_name(v)]
            assert np.all(true < 2 * estimate) and np.all(estimate < 2 * true), (rank, v, true, estimate)
    assert 0.2 > gradient_errors[0] > 5 * gradient_errors[1] > 0, gradient_errors


@pytest.mark.mixed_promotion
def test_single_steps_are_segments_of_one():
    n = gru(3, steps=7)
    state = n.learner.init(n.params, n.carry, n.xs[0])
    run = jax.jit(n.learner.value_and_grad(squared_error, segment_length=1))
    (_, whole), needed = run(n.params, state, n.xs, n.targets)

    @jax.jit
    def step(state, x, target):
        state, y = n.learner.step(n.params, state, x)
        return state, n.learner.gradient(n.params, state, jax.grad(squared_error)(y, target))

    total = jax.tree.map(jnp.zeros_like, needed)
    for x, target in zip(n.xs, n.targets, strict=True):
        state, grads = step(state, x, target)
        total = jax.tree.map(jnp.add, total, grads)
    assert_same_gradient(total, needed, FLOAT64)
    # The last step is still pending, and goes in before a sequence does.
    (_, more), _ = run(n.params, state, n.xs, n.targets)
    (_, again), _ = run(n.params, whole, n.xs, n.targets)
    assert_same_gradient(more.traces, again.traces, 1e-7)


# --- the product itself, beside numpy ---------------------------------------------------------------------------------


def random_layout(rank: int, rows: int, columns: int) -> Layout:
    return Layout(rank, (), (), (), (), (rows,), (columns,), np.arange(rows), 2)


def test_little_more_is_lost_than_the_best_product_of_that_rank_would():
    """Segments of 8 steps with a spectrum that falls: the exact S by numpy, its best approximation by its SVD."""
    rows, columns, batch, rank = 20, 30, 2, 5
    layout, numbers = random_layout(rank, rows, columns), np.random.default_rng(0)
    trace = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), layout.shapes(batch, jnp.dtype(float)))
    advance = jax.jit(lambda *arguments: low_rank.advance(layout, *arguments))
    mix = [numbers.normal(size=(n, n)) * 0.6 ** np.arange(n) for n in (2 * rows, columns)]
    exact = np.zeros((batch, 2 * rows, columns))
    for segment in range(12):
        blocks = 0.5 * numbers.uniform(-1, 1, (batch, 2, 2, rows))
        deltas = numbers.normal(size=(batch, 8, 2 * rows)) @ mix[0].T
        z = numbers.normal(size=(batch, 8, columns)) @ mix[1].T
        wide = np.einsum("bijn,nm->binjm", blocks, np.eye(rows)).reshape(batch, 2 * rows, 2 * rows)
        exact = wide @ exact + np.einsum("bcn,bcm->bnm", deltas, z)
        trace = advance(trace, blocks, deltas, z)
        if segment < 2:
            continue
        kept = np.einsum("brn,brm->bnm", trace.left, trace.right)
        for b in range(batch):
            best = np.sqrt(np.sum(np.linalg.svd(exact[b], compute_uv=False)[rank:] ** 2))
            assert np.linalg.norm(exact[b] - kept[b]) < 2.5 * best
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (low_rank.PROBES, columns))
    np.testing.assert_allclose(trace.probed, np.einsum("bnm,pm->bpn", exact, signs), rtol=1e-9)


def test_a_rank_that_collapsed_comes_back():
    """Steps all alike leave one direction; what comes after them is found again."""
    layout, numbers = random_layout(6, 20, 30), np.random.default_rng(1)
    trace = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), layout.shapes(1, jnp.dtype(float)))
    advance = jax.jit(lambda *arguments: low_rank.advance(layout, *arguments))
    still = np.broadcast_to(np.eye(2)[None, :, :, None], (1, 2, 2, 20))
    alike = [np.broadcast_to(numbers.normal(size=(1, 1, n)), (1, 8, n)) for n in (40, 30)]
    few = [numbers.normal(size=(4, n)) for n in (40, 30)]
    for _ in range(20):
        trace = advance(trace, 0.5 * still, *alike)
    assert float(jnp.linalg.matrix_rank(trace.right[0], 1e-9)) == 1
    for _ in range(4):
        weights = numbers.normal(size=(1, 8, 4))
        trace = advance(trace, 0.1 * still, weights @ few[0], weights @ few[1])
    assert float(low_rank.relative_error(trace)[0]) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_orthonormal_rows_whatever_comes_in(dtype):
    numbers = np.random.default_rng(0).normal(size=(6, 9, 7))  # more rows than there are directions
    numbers[1, 3] = numbers[1, 1] + 1e-6 * numbers[1, 2]  # nearly dependent
    numbers[2] = 0
    numbers[3] *= 1e-30  # squares underflow
    numbers[4] = numbers[4, :1]  # all alike
    numbers[5] = np.outer(0.01 ** np.arange(9), np.ones(7)) * numbers[5]
    basis = np.asarray(low_rank.orthonormal(jnp.asarray(numbers, dtype)), float)
    gram = np.einsum("brn,bqn->brq", basis, basis)
    sizes = np.diagonal(gram, axis1=1, axis2=2)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    assert np.all((np.abs(sizes - 1) < tolerance) | (sizes == 0))
    np.testing.assert_allclose(gram, sizes[:, None] * np.eye(9), atol=tolerance)
    assert not sizes[2].any()
    assert all(sizes[i].sum() > 6.9 for i in (0, 1, 3, 5))


# --- what a user sees -------------------------------------------------------------------------------------------------


@pytest.mark.mixed_promotion
def test_bytes_are_those_that_analyse_lists_and_few():
    n = gru(2, hops=0)
    state = n.learner.init(n.params, n.carry, n.xs[0])
    analysis = analyse(n.learner, n.params, n.carry, n.xs[0], rank=2)
    costs = {mode.name: mode.cost for mode in analysis.modes}
    assert "deep e-prop, rank=2" in str(analysis)
    assert costs["deep e-prop, rank=2"].trace_bytes == tree_bytes(state.traces)
    assert any(isinstance(trace, LowRank) for trace in state.traces.values())


@pytest.mark.mixed_promotion
def test_compare_to_bptt_shows_what_the_trace_has_lost():
    n = gru(2, hops=0)
    comparison = compare_to_bptt(n.learner, n.params, n.carry, n.xs, n.targets, squared_error)
    assert set(comparison.trace_errors) == {"0 <- 0, low rank"}
    assert "trace 0 <- 0, low rank: relative error" in str(comparison)


@pytest.mark.parametrize(
    ("rank", "error", "message"), [(0, ValueError, ">= 1"), (True, TypeError, "integer"), (2.0, TypeError, "integer")]
)
def test_rank_is_checked(rank, error, message):
    with pytest.raises(error, match=message):
        deep_eprop(nn.GRUCell(features=2), rank=rank)
