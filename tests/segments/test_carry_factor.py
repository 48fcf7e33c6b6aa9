"""A projected carry whose weights are kept as one product of low rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import compare_to_bptt, deep_eprop, trace_error, with_basis
from deepeprop_jax.traces import low_rank
from tests.gradients import FLOAT64, assert_same_gradient
from tests.segments.test_projected import by_steps, setup
from tests.segments.test_segment import STEPS, flags_of
from tests.traces.test_low_rank import slow_gates
from tests.zoo import cells, networks, problem, start

WHOLE = 64
"""More than any weight of the zoo has rows or columns."""


def pair(name: str, q: int, rank: int = 2, **options):
    """The problem, and learners and states with the same basis: V whole, and as products of rank q."""
    p = problem(name, steps=STEPS)
    p = p._replace(params=slow_gates(p.params))
    _, whole, basis, state = setup(p, rank, **options)
    learner = deep_eprop(p.network, carry_rank=len(basis.directions), carry_factor=q, **options)
    return p, (whole, state), (learner, with_basis(start(learner, p), basis))


def check(name: str, kind: str, lengths: tuple[int, ...] = (1, 3)) -> bool:
    p, *both = pair(name, WHOLE)
    factored = False
    for length in lengths:
        found = []
        for learner, state in both:
            run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
            (_, end), grads = run(p.params, state, p.xs, p.targets, *flags_of(kind))
            found.append(grads)
        factored = factored or bool(end.traces["projected carry"].factored)
        assert_same_gradient(found[1], found[0], FLOAT64, f"{name}, C={length}")
    return factored


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("stack_2", "random"),
        ("linen_lstm", "random"),
        pytest.param("graph_skip", "none", marks=pytest.mark.slow),
        ("alif_refractory", "none"),
    ],
)
def test_of_full_rank_it_is_the_whole_carry(name, kind):
    assert check(name, kind)


def test_what_is_no_outer_product_stays_whole():
    assert not check("depth_4", "none", (3,))
    assert not check("einsum_shared_heads", "none", (3,))


@pytest.mark.sweep
@pytest.mark.parametrize("name", [*cells(), *networks()])
def test_the_whole_zoo(name):
    check(name, "random")


def test_single_steps_are_projected_once_in_a_segment():
    p, _, (learner, state) = pair("stack_2", 2, project_every=3)
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=3))
    (_, end), right = run(p.params, state, p.xs, p.targets)
    found, last = by_steps(p, learner, state)
    assert_same_gradient(found, right, FLOAT64)
    again = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=3))(p.params, last, p.xs, p.targets)
    assert_same_gradient(again[1], run(p.params, end, p.xs, p.targets)[1], FLOAT64)


@pytest.mark.mixed_promotion
def test_a_higher_rank_loses_less_and_the_state_says_how_much():
    errors = []
    for q in (1, 3):
        p, (whole, state), (learner, factored) = pair("stack_2", q)
        (_, exact), needed = jax.jit(whole.value_and_grad(p.loss_fn, segment_length=2))(
            p.params, state, p.xs, p.targets
        )
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=2))
        (_, end), grads = run(p.params, factored, p.xs, p.targets)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(needed), strict=True)
        errors.append(float(sum(jnp.sum((a - b) ** 2) for a, b in pairs)))
        plan = learner.plan(p.params, p.carry, p.xs[0])
        for k, (vertex, layout) in enumerate(zip(plan.graph.nodes, plan.projection.layouts, strict=True)):
            if layout is None:
                assert vertex.name == "1"  # whose output reads parameters
                continue
            trace = end.traces["projected carry"].factored[vertex.name]
            seen = low_rank.multiplied_out(layout, trace)
            columns = exact.traces["projected carry"].columns[vertex.name]
            full = dict(zip(plan.trained[k], columns, strict=True))
            lost = size = 0.0
            for block, part in zip(layout.blocks, seen, strict=True):
                right = full[block.leaves[0]].reshape(part.shape)
                lost, size = lost + jnp.square(right - part).sum((1, 2)), size + jnp.square(right).sum((1, 2))
            true, estimate = np.sqrt(lost / size), trace_error(end)[f"projected carry, {vertex.name}"]
            assert np.all(true < 3 * estimate) and np.all(estimate < 3 * true), (q, k, true, estimate)
    assert errors[1] < errors[0] / 4


def test_rounding_chooses_no_directions():
    """After a segment of two steps V has two directions, of three that are kept."""
    p, _, (learner, state) = pair("stack_2", 3)
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=2))
    right = run(p.params, state, p.xs, p.targets)[1]
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-15), p.params)
    assert_same_gradient(run(moved, state, p.xs, p.targets)[1], right, 1e-9)


def test_more_than_the_full_rank_is_the_full_rank():
    _, _, (_, state) = pair("stack_2", 1000)
    left, right, _ = state.traces["projected carry"].factored["0"]
    assert left.shape[1] == right.shape[1] == min(left.shape[2], right.shape[2])


def test_parameters_that_are_not_trained_have_no_trace():
    p = problem("linen_lstm", steps=STEPS)
    _, _, basis, _ = setup(p, 2)
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, p.params)
    grads = []
    for q in (None, WHOLE):
        learner = deep_eprop(p.network, carry_rank=2, carry_factor=q, trainable=mask)
        state = with_basis(start(learner, p), basis)
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=3))
        grads.append(run(p.params, state, p.xs, p.targets)[1])
    assert_same_gradient(grads[1], grads[0], FLOAT64)
    assert all(keep or not jnp.any(g) for keep, g in zip(*map(jax.tree.leaves, (mask, grads[1])), strict=True))


def test_it_holds_what_was_predicted():
    p, _, (learner, state) = pair("stack_2", 2)
    plan = learner.plan(p.params, p.carry, p.xs[0])
    layout = plan.projection.layouts[0]
    left, right, _ = state.traces["projected carry"].factored["0"]
    assert left[0].size + right[0].size == 2 * (2 * layout.rows + layout.columns)


def test_it_is_compared_with_bptt_as_all_others_are():
    p, _, (learner, _) = pair("stack_2", WHOLE)
    report = compare_to_bptt(learner, p.params, p.carry, p.xs, p.targets, p.loss_fn, segment_length=3)
    assert set(report.trace_errors) == {"projected carry, 0"}
