"""A reset cleans: nothing of an example whose numbers were not finite is left after it, at any step of a segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop
from tests.gradients import FLOAT64, SAME, assert_same_gradient
from tests.zoo import cells, networks, problem, start

MODES = {
    "deep e-prop": {},
    "no hops": {"hops": 0},
    "exact": {"exact": True},
    "rank 2": {"hops": 0, "rank": 2},
}
FEW = [
    ("linen_lstm", "no hops", 4),
    ("alif_refractory", "deep e-prop", 4),
    ("gru_reset_before", "deep e-prop", 4),
    ("derived_leaves", "exact", 9),
    ("stack_3", "deep e-prop", 4),
    ("stack_3", "rank 2", 4),
    ("graph_two_outputs", "exact", 1),
    ("depth_4", "deep e-prop", 4),
]


def check_nothing_survives(name: str, mode: str, length: int) -> None:
    """Example 1 sees numbers that are not finite and is reset later: all that follows is as if it had not seen them."""
    p = problem(name, steps=9)
    learner = deep_eprop(p.network, **MODES[mode])
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
    resets = jnp.zeros((9, 3), bool).at[(2, 5, 6), (1, 1, 0)].set(True)
    needed = run(p.params, start(learner, p), p.xs, p.targets, resets)[0][1]
    for number in (jnp.nan, jnp.inf):
        spoiled = jax.tree.map(lambda leaf, number=number: leaf.at[1:4, 1].set(number), p.xs)
        (_, seen), _ = run(p.params, start(learner, p), spoiled, p.targets, resets)
        assert_same_gradient(
            (seen.carry, seen.traces), (needed.carry, needed.traces), SAME, f"{name}, {mode}, {number}"
        )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen.traces))
    _, grads = run(p.params, seen, p.xs, p.targets, jnp.zeros((9, 3), bool))
    _, wanted = run(p.params, needed, p.xs, p.targets, jnp.zeros((9, 3), bool))
    assert_same_gradient(grads, wanted, FLOAT64, f"{name}, {mode}")


@pytest.mark.parametrize(("name", "mode", "length"), FEW)
def test_a_reset_inside_a_segment_cleans(name, mode, length):
    check_nothing_survives(name, mode, length)


# A convolution's weight gradient per example is a grouped convolution, and XLA on a CPU multiplies by zeros from one
# group to another: jax.vmap(jax.grad(...)) of one alone gives NaN for all examples where one is NaN.
MIXED_BY_XLA = ("linen_conv_lstm", "convolution")


@pytest.mark.sweep
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in (*cells(), *networks()) if name not in MIXED_BY_XLA])
def test_a_reset_inside_a_segment_cleans_the_whole_zoo(name, mode):
    for length in (4, 9):
        check_nothing_survives(name, mode, length)


@pytest.mark.parametrize(
    ("name", "mode"), [("lru", "deep e-prop"), ("stack_3", "deep e-prop"), ("stack_3", "rank 2"), ("lif", "exact")]
)
def test_the_gradient_after_a_partial_reset_has_no_part_of_the_example(name, mode):
    p = problem(name)
    learner = deep_eprop(p.network, **MODES[mode])
    step, gradient = jax.jit(learner.step), jax.jit(learner.gradient)
    found = []
    for number in (0.5, jnp.nan, jnp.inf):
        state = start(learner, p)
        for t in range(3):
            x = p.xs[t].at[1].set(number) if t else p.xs[t]
            state, y = step(p.params, state, x)
        state = learner.reset(state, jnp.array([False, True, False]))
        dy = jax.grad(p.loss_fn)(y.at[1].set(0.3), jax.tree.map(lambda leaf: leaf[2], p.targets))
        grads = gradient(p.params, state, dy)
        state, _ = step(p.params, state, p.xs[3])
        found.append((grads, state.carry, state.traces))
    for seen in found[1:]:
        assert_same_gradient(seen, found[0], FLOAT64, name)
