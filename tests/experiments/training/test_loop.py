"""The loop of all training: rules and updates are what they say; gradients beside BPTT's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepeprop_jax import OnlineLearner, deep_eprop
from experiments.tasks.targets import cross_entropy
from experiments.training.against_bptt import compare
from experiments.training.loop import Learning, Loop
from experiments.training.rules import RULES
from tests.experiments.training.dense import BATCH, INPUTS, STEPS, dense_task
from tests.gradients import FLOAT64, assert_same_gradient

RATE = 0.5


@functools.cache
def beginning() -> Learning:
    """Before anything is learnt: the same for every rule."""
    task = dense_task()
    rule = RULES["BPTT"](task.network, cross_entropy)
    return Loop(task, rule, optax.sgd(RATE), STEPS, batches_per_call=2).start(jax.random.key(0))


@functools.cache
def learnt(rule: str, update_every: int = STEPS, continues: bool = False) -> tuple[Learning, Learning, jax.Array]:
    """Before and after two batches of plain gradient descent, and the mean loss."""
    task = dense_task(continues)
    loop = Loop(task, RULES[rule](task.network, cross_entropy), optax.sgd(RATE), update_every, batches_per_call=2)
    first = loop.start(jax.random.key(0)) if continues else beginning()
    return first, *loop.advance(first, jax.random.key(0), np.int32(0))


def change(rule: str) -> tuple:
    """What two batches did to the parameters: the sum of two gradients, the second at other parameters."""
    first, last, _ = learnt(rule)
    return optax.tree.sub(last.params, first.params)


def moved(tree) -> bool:
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))


ALIKE = ("R = 1", "R = 2", "R = 8", "R = 1, own traces", "hops = 1")
"""Those that differ from another in a number."""


@pytest.mark.parametrize("rule", [pytest.param(r, marks=[pytest.mark.slow] * (r in ALIKE)) for r in RULES])
def test_every_rule_learns_two_batches(rule: str) -> None:
    _, last, loss = learnt(rule)
    assert np.isfinite(loss) and loss > 0
    chex.assert_tree_all_finite(last)
    frozen = {"lower frozen": [0], "readout only": [0, 1]}.get(rule, [])
    assert [moved(layer) for layer in change(rule)] == [layer not in frozen for layer in range(3)]


@pytest.mark.parametrize(
    "rule, same, other",
    [
        ("TBPTT(50)", "BPTT", "TBPTT(10)"),
        ("exact RTRL", "BPTT", "deep e-prop"),
        ("exact in segments", "BPTT", "e-prop in segments"),
        ("e-prop in segments", "deep e-prop", "hops = 0"),
        ("immediate only", "TBPTT(1)", "hops = 0"),
        # One recurrent layer lies above the lower one.
        ("hops = 1", "deep e-prop", "hops = 0"),
        ("R = 4, step by step", "R = 4", "hops = 0"),
        ("SnAp-1", "hops = 0", "deep e-prop"),
        ("SnAp-2", "exact RTRL", "deep e-prop"),
    ],
)
def test_rules_that_must_agree_do_and_others_do_not(rule: str, same: str, other: str) -> None:
    assert_same_gradient(change(rule), change(same), FLOAT64)
    with pytest.raises(AssertionError):
        assert_same_gradient(change(rule), change(other), 1e-3)


@functools.cache
def step_by_step() -> tuple[OnlineLearner, Callable]:
    """Deep e-prop of the dense task, and one step of it with that step's contribution to the gradient."""
    learner = deep_eprop(dense_task().network)

    @jax.jit
    def step(params, state, x, target):
        state, y = learner.step(params, state, x)
        return state, learner.gradient(params, state, jax.grad(cross_entropy)(y, target))

    return learner, step


@pytest.mark.parametrize("update_every, continues", [(STEPS, False), (4, False), (4, True)])
def test_updates_are_those_of_the_learner_taken_step_by_step(update_every: int, continues: bool) -> None:
    """The gradient of each piece at the parameters of its time; traces stay over an update, and over a batch that
    continues the one before."""
    task = dense_task()
    learner, step = step_by_step()
    first, last, _ = learnt("deep e-prop", update_every, continues)
    params = first.params
    carry = task.network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS)))[1]

    state = learner.init(params, carry, jnp.zeros((BATCH, INPUTS)))
    for index in range(2):
        xs, targets = task.sample(jax.random.key(0), index)
        state = state if continues else learner.init(params, carry, xs[0])
        for start in range(0, STEPS, update_every):
            total = optax.tree.zeros_like(params)
            for t in range(start, start + update_every):
                state, grads = step(params, state, xs[t], jax.tree.map(lambda leaf, t=t: leaf[t], targets))
                total = optax.tree.add(total, grads)
            params = optax.apply_updates(params, optax.tree.scale(-RATE, total))
    assert_same_gradient(last.params, params, FLOAT64)
    assert (last.stream is not None) == continues
    if continues:
        assert_same_gradient(last.stream.carry, state.carry, FLOAT64)


def test_seeds_side_by_side_learn_as_each_alone() -> None:
    task = dense_task()
    loop = Loop(task, RULES["deep e-prop"](task.network, cross_entropy), optax.sgd(RATE), STEPS, batches_per_call=2)
    keys = jax.random.split(jax.random.key(0), 2)
    starts = [loop.start(key) for key in keys]
    both, last = loop.advance_seeds(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts), keys, np.int32(0))
    for seed, (key, start) in enumerate(zip(keys, starts, strict=True)):
        alone, _ = loop.advance(start, key, np.int32(0))
        assert_same_gradient(jax.tree.map(lambda leaf, i=seed: leaf[i], both.params), alone.params, FLOAT64)
    # The last update, with the parameters before it.
    after = optax.tree.sub(last.params, optax.tree.scale(RATE, last.gradient))
    assert_same_gradient(after, both.params, FLOAT64)


def test_figures_of_a_layer() -> None:
    found = compare({"a": jnp.array([3.0]), "b": jnp.array([0.0])}, {"a": jnp.array([1.0]), "b": jnp.array([1.0])})
    assert found == pytest.approx({"cosine": 0.5**0.5, "relative_error": 2.5**0.5, "norm_ratio": 4.5**0.5})
    nothing = {"cosine": None, "relative_error": None, "norm_ratio": None}
    assert compare((), ()) == nothing
    assert compare(jnp.ones(1), jnp.zeros(1)) == nothing
    assert compare(jnp.full(1, jnp.nan), jnp.ones(1)) == nothing
    assert compare(jnp.zeros(1), jnp.ones(1)) == {"cosine": None, "relative_error": 1, "norm_ratio": 0}
    # A complex number is two real ones.
    turned = compare(jnp.full(1, 2j), jnp.full(1, 1 + 0j))
    assert turned == pytest.approx({"cosine": 0, "relative_error": 5**0.5, "norm_ratio": 2})


@pytest.mark.parametrize(
    ("rule", "exact"), [("exact RTRL", True), ("BPTT", True), ("hops = 0", False), ("R = 1", False)]
)
def test_a_metered_loop_knows_its_own_error(rule: str, exact: bool) -> None:
    task = dense_task()
    made = RULES[rule](task.network, cross_entropy)
    loop = Loop(task, made, optax.sgd(RATE), STEPS, batches_per_call=6, metered=True)
    learning, _ = loop.advance(loop.start(jax.random.key(0)), jax.random.key(0), np.int32(0))
    found = loop.error(learning)
    assert len(found["meter_nodes"]) == 3
    assert (found["meter"] < 1e-9) == exact
    assert learning.meter.counts.tolist() == [2, 2, 2]
