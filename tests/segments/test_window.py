"""Single steps that wait in a window and are projected once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop, with_basis
from deepeprop_jax.network.cell import Cell
from tests.gradients import SAME, assert_same_gradient
from tests.segments.test_projected import Basis, by_steps, oracle, random_basis, setup
from tests.zoo import problem, start


@pytest.mark.parametrize("every", [1, 3])
def test_steps_are_projected_once_in_so_many(every):
    p = problem("stack_2", steps=7)
    plan, learner, basis, state = setup(p, 2, project_every=every)
    total, _ = by_steps(p, learner, state)
    _, right = jax.jit(oracle(p, plan, basis, every))(p.params, p.carry, p.xs, p.targets)
    assert_same_gradient(total, right, SAME)


@pytest.mark.parametrize("name", ["linen_lstm", "depth_4"])
def test_resets_between_steps_are_those_of_a_sequence(name):
    p = problem(name, steps=8)
    resets = jax.random.bernoulli(jax.random.key(1), 0.3, (8, 3)).at[(0, 3, 6), (0, 1, 2)].set(True)
    _, learner, _, state = setup(p, 2, project_every=3)
    total, held = by_steps(p, learner, state, resets)
    (_, after), grads = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=3))(
        p.params, state, p.xs, p.targets, resets
    )
    assert_same_gradient(total, grads, SAME)
    # And a sequence goes on from a window of two steps.
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=3))
    assert_same_gradient(*(run(p.params, s, p.xs, p.targets)[1] for s in (held, after)), SAME)


def test_a_reset_between_steps_leaves_the_other_examples_alone():
    p = problem("linen_gru", steps=6, batch=2)
    _, learner, _, state = setup(p, 2)
    step, run = jax.jit(learner.step), jax.jit(learner.value_and_grad(p.loss_fn, segment_length=2))
    for t in range(3):
        state, _ = step(p.params, state, p.xs[t])
    after = learner.reset(state, jnp.array([True, False]))
    again = learner.reset(state, jnp.array([True, True]))
    targets = jax.tree.map(lambda leaf: leaf[3:], p.targets)
    weights = jnp.zeros((3, 2), bool)
    found = {}
    for which, held in (("one", after), ("all", again), ("none", state)):
        for example in range(2):
            valid = weights.at[:, example].set(True)
            found[which, example] = run(p.params, held, p.xs[3:], targets, None, valid)[1]
    assert_same_gradient(found["one", 0], found["all", 0], SAME)
    assert_same_gradient(found["one", 1], found["none", 1], SAME)


def steep() -> Cell:
    """Its slope is infinite where the input is zero."""

    def apply(params, h, x):
        drive = x @ params
        h = jnp.tanh(0.5 * h + drive / jnp.sqrt(jnp.sum(drive**2)))
        return h, h

    return Cell(None, apply)


def steps_of(learner, params, state, xs):
    """Gradients of all steps, for ones on the output."""
    step, gradient = jax.jit(learner.step), jax.jit(learner.gradient)
    for x in xs:
        state, y = step(params, state, x)
        yield state, gradient(params, state, jnp.ones_like(y))


def test_steps_that_are_not_there_yet_have_no_part_in_the_gradient():
    params, carry = jnp.eye(2, 3), jnp.zeros((2, 3))
    xs = jax.random.normal(jax.random.key(0), (5, 2, 2))
    learner = deep_eprop(steep(), carry_rank=3, project_every=4)
    state = with_basis(learner.init(params, carry, xs[0]), Basis(np.eye(3), np.eye(3)))
    exact = deep_eprop(steep(), exact=True)
    pairs = zip(
        steps_of(learner, params, state, xs),
        steps_of(exact, params, exact.init(params, carry, xs[0]), xs),
        strict=True,
    )
    for (_, seen), (_, needed) in pairs:
        assert_same_gradient(seen, needed, SAME)


@pytest.mark.parametrize("bad", [0, 2])
def test_a_reset_cleans_what_waits_of_an_example_that_was_not_finite(bad):
    p = problem("linen_gru", steps=7, batch=2)
    learner = deep_eprop(p.network, carry_rank=2, project_every=3)
    clean = with_basis(start(learner, p), random_basis(2, 3))
    gradient, step = jax.jit(learner.gradient), jax.jit(learner.step)

    def run(xs):
        state, found = clean, []
        for t, x in enumerate(xs):
            state, y = step(p.params, state, x)
            dy = jnp.ones_like(y).at[0].set(0 if t <= bad else 1)
            if t == bad:
                state = learner.reset(state, jnp.array([True, False]))
            if t >= bad:
                found.append(gradient(p.params, state, dy))
        return found

    for seen, needed in zip(run(p.xs.at[bad, 0].set(jnp.nan)), run(p.xs), strict=True):
        assert_same_gradient(seen, needed, SAME)
