"""An update every k steps of a stream: by ``optax.MultiSteps`` step by step, or by ``value_and_grad`` of k steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from deepeprop_jax import deep_eprop
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import problem, start

EVERY, STEPS = 4, 12


def step_by_step(learner, p, optimiser, state):
    """Params and traces after a scan over single steps."""

    def body(stream, at):
        (params, opt_state, state), (x, target) = stream, at
        state, y = learner.step(params, state, x)
        grads = learner.gradient(params, state, jax.grad(p.loss_fn)(y, target))
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    (params, _, state), _ = jax.lax.scan(body, (p.params, optimiser.init(p.params), state), (p.xs, p.targets))
    return params, learner.step(params, state, p.xs[0])[0].traces  # with the step that waits


def by_chunks(learner, p, optimiser, state):
    run = learner.value_and_grad(p.loss_fn)

    def body(stream, chunk):
        params, opt_state, state = stream
        (_, state), grads = run(params, state, *chunk)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, EVERY, *leaf.shape[1:]), (p.xs, p.targets))
    (params, _, state), _ = jax.lax.scan(body, (p.params, optimiser.init(p.params), state), chunks)
    return params, learner.step(params, state, p.xs[0])[0].traces


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(
    ("name", "options"),
    [("stack_2", {"hops": 0}), *(pytest.param("stack_3", o, marks=pytest.mark.slow) for o in ({}, {"exact": True}))],
    ids=str,
)
def test_multi_steps_and_chunks_are_the_same(name, options):
    p = problem(name, steps=STEPS)
    learner, heavy = deep_eprop(p.network, **options), optax.sgd(0.003, momentum=0.9)
    several = optax.MultiSteps(heavy, EVERY, use_grad_mean=False, accumulator_dtype=jnp.float64)
    state = start(learner, p)
    needed = jax.jit(lambda state: by_chunks(learner, p, heavy, state))(state)
    seen = jax.jit(lambda state: step_by_step(learner, p, several, state))(state)
    assert_same_gradient(seen, needed, FLOAT64)
    moved = jax.tree.map(jnp.subtract, needed[0], p.params)
    assert min(jnp.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-4  # the params did change on the way
