"""What ``jax.grad`` of a cell can do, a learner can; what it cannot is refused with its words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import Cell, deep_eprop
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT64, assert_same_gradient

PLACES = jnp.array([1, 3])

CELLS = {
    "multiplied by the input": lambda p, h, x: h.at[PLACES].multiply(x[:2]),
    "multiplied by a constant": lambda p, h, x: h.at[PLACES].multiply(0.5),
    "multiplied at unique places": lambda p, h, x: h.at[PLACES].multiply(p["s"], unique_indices=True),
    "added and set": lambda p, h, x: h.at[PLACES].add(p["s"]).at[0].set(p["s"][0] * h[2]),
    "largest": lambda p, h, x: h.at[PLACES].max(p["s"]),
    "sorted": lambda p, h, x: jnp.sort(h) * jax.lax.cummax(h),
    "segments": lambda p, h, x: jax.ops.segment_sum(h, jnp.array([0, 1, 1, 3]), 4),
    "solved": lambda p, h, x: jnp.linalg.solve(3 * jnp.eye(4) + p["U"], h),
}


def problem(function):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"W": (3, 4), "U": (4, 4), "s": (2,)}
    params = {
        name: jax.random.normal(key, shape, float) / 2 for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }

    def apply(p, h, x):
        h = function(p, jnp.tanh(x @ p["W"] + h @ p["U"]), x)
        return h, h

    return apply, params, jnp.full((2, 4), 0.1), jax.random.normal(keys[3], (6, 2, 3), float)


def loss_fn(y, target):
    return jnp.sum(y**2 * jnp.arange(1.0, 5.0)[None])


@pytest.mark.parametrize("name", CELLS)
def test_what_bptt_can_do(name):
    apply, params, carry, xs = problem(CELLS[name])
    learner = deep_eprop(apply, exact=True)

    def gradients(params, carry, xs):
        state = learner.init(params, carry, xs[0])
        found = [bptt(Cell(None, apply), loss_fn)(params, carry, xs, jnp.zeros(6))[1]]
        for length in (1, 3):
            run = learner.value_and_grad(loss_fn, segment_length=length)
            found.append(run(params, state, xs, jnp.zeros(6))[1])
        return found

    needed, *seen = jax.jit(gradients)(params, carry, xs)
    for grads in seen:
        assert_same_gradient(grads, needed, FLOAT64, name)


def test_what_bptt_cannot_do_is_refused_with_its_words():
    apply, params, carry, xs = problem(lambda p, h, x: h.at[PLACES].multiply(p["s"]))
    with pytest.raises(NotImplementedError, match="unique_indices") as plain:
        jax.grad(lambda p: bptt(Cell(None, apply), loss_fn)(p, carry, xs, jnp.zeros(6))[0][0])(params)
    with pytest.raises(ValueError, match=r"Node 'cell' has no reverse-mode derivative.*unique_indices") as ours:
        deep_eprop(apply).init(params, carry, xs[0])
    assert str(plain.value).splitlines()[0] in str(ours.value)
