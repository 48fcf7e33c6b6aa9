"""Segments on what few networks have: keys on a wire, an empty leaf, a scalar gain, a narrow dtype over many steps."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, deep_eprop, graph
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT32, FLOAT64, assert_same_gradient


def cell(apply, params, carry):
    """A cell with given numbers; carry for a batch of 2."""
    return Cell(lambda key, x: (params, carry), apply)


def recurrent(p, h, x):
    h = jnp.tanh(p["a"] * h + p["w"] @ x)
    return h, h


WEIGHTS = {"a": jnp.array([0.5, 0.9, -0.3]), "w": jnp.array([[0.3, 0.2], [0.1, -0.4], [0.5, 0.6]])}
LOW = cell(recurrent, WEIGHTS, 0.1 * jnp.ones((2, 3)))


def check(network, xs, tolerance=FLOAT64):
    """Element-wise cells: deep e-prop is BPTT, in whole sequences and one step at a time."""
    x = jax.tree.map(lambda leaf: leaf[0], xs)
    params, carry = network.init(jax.random.key(0), x)
    learner = deep_eprop(network)
    state = learner.init(params, carry, x)
    targets = jnp.zeros(jax.tree.leaves(xs)[0].shape[0])

    def loss_fn(y, target):
        return jnp.sum((y - 0.3) ** 2) + target

    _, needed = jax.jit(bptt(network, loss_fn))(params, carry, xs, targets)
    _, grads = jax.jit(learner.value_and_grad(loss_fn, segment_length=3))(params, state, xs, targets)
    assert_same_gradient(grads, needed, tolerance, "segments")
    total = jax.tree.map(jnp.zeros_like, needed)
    step, gradient, loss_gradient = jax.jit(learner.step), jax.jit(learner.gradient), jax.jit(jax.grad(loss_fn))
    for t in range(len(targets)):
        state, y = step(params, state, jax.tree.map(lambda leaf, t=t: leaf[t], xs))
        total = jax.tree.map(jnp.add, total, gradient(params, state, loss_gradient(y, 0.0)))
    assert_same_gradient(total, needed, tolerance, "steps")


def inputs(steps=7):
    return jnp.asarray(np.random.default_rng(0).standard_normal((steps, 2, 2)))


def test_a_scalar_that_only_the_output_reads():
    def apply(p, h, x):
        h, _ = recurrent(p, h, x)
        return h, p["gain"] * h

    check(cell(apply, WEIGHTS | {"gain": jnp.asarray(0.7)}, 0.1 * jnp.ones((2, 3))), inputs())


def test_a_carry_leaf_without_components():
    def apply(p, carry, x):
        h, y = recurrent(p, carry["h"], x)
        return {"empty": carry["empty"], "h": h}, y

    check(cell(apply, WEIGHTS, {"empty": jnp.zeros((2, 0)), "h": 0.1 * jnp.ones((2, 3))}), inputs())


def test_keys_beside_numbers_on_a_wire():
    def low(p, h, x):
        return recurrent(p, h, x["u"])

    def noisy(p, carry, u):
        noise = jax.random.normal(u["input"]["key"], (3,), jnp.float64)
        return carry, p["scale"] * u["low"] + 0.1 * noise

    network = graph(
        {
            "low": (cell(low, WEIGHTS, 0.1 * jnp.ones((2, 3))), "input"),
            "high": (cell(noisy, {"scale": jnp.array([0.5, 0.7, 0.9])}, ()), {"low": "low", "input": "input"}),
        },
        outputs="high",
    )
    check(network, {"u": inputs(), "key": jax.random.split(jax.random.key(1), (7, 2))})


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("length", [64, 256])
def test_bfloat16_parameters_remember_over_a_long_segment(length):
    """h = a h + w x with a = .99: the sum over 256 steps is kept in float32, so its length matters little."""

    def run(dtype, segment_length):
        def apply(p, h, x):
            h = p["a"] * h + p["w"] * x
            return h, h

        params = {"a": jnp.full(1, 0.99, dtype), "w": jnp.full(1, 0.01, dtype)}
        network = cell(apply, params, jnp.zeros((1, 1), dtype))
        xs = jnp.ones((256, 1, 1), dtype)
        learner = deep_eprop(network)
        state = learner.init(params, jnp.zeros((1, 1), dtype), xs[0])
        loss_fn = lambda y, target: y.astype(jnp.float32).sum() + target  # noqa: E731
        run = jax.jit(learner.value_and_grad(loss_fn, segment_length=segment_length))
        (_, end), grads = run(params, state, xs, jnp.zeros(256, jnp.float32))
        return [float(leaf.astype(jnp.float32)[0]) for leaf in jax.tree.leaves(grads)], end.traces

    seen, traces = run(jnp.bfloat16, length)
    by_step, traces_by_step = run(jnp.bfloat16, 1)
    np.testing.assert_allclose(seen, by_step, rtol=1e-2)  # parameters' own rounding is 4e-3
    for a, b in zip(jax.tree.leaves(traces), jax.tree.leaves(traces_by_step), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2)


@pytest.mark.parametrize("length", [1, 2])
def test_aux_without_elements_keeps_its_shape(length):
    learner = deep_eprop(nn.GRUCell(features=3), exact=True)
    xs = jnp.ones((5, 2, 2), jnp.float32)
    params, carry = learner.network.init(jax.random.key(0), xs[0])
    run = learner.value_and_grad(lambda y, t: (jnp.sum(y), y[:0]), segment_length=length, has_aux=True)
    ((_, aux), _), _ = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(5))
    assert aux.shape == (5, 0, 3)


def test_the_loss_of_single_steps_is_called_as_it_is():
    """Not under vmap, which callbacks have to allow."""
    learner = deep_eprop(nn.GRUCell(features=3), exact=True)
    xs = jnp.ones((4, 2, 2), jnp.float32)
    params, carry = learner.network.init(jax.random.key(0), xs[0])

    def loss_fn(y, target):
        scale = jax.pure_callback(lambda t: np.float32(2), jax.ShapeDtypeStruct((), jnp.float32), target)
        return scale * jnp.sum(y**2)

    state, targets = learner.init(params, carry, xs[0]), jnp.zeros(4, jnp.float32)
    found = jax.jit(learner.value_and_grad(loss_fn, segment_length=1))(params, state, xs, targets)[1]
    plain = learner.value_and_grad(lambda y, t: 2 * jnp.sum(y**2), segment_length=1)
    assert_same_gradient(found, jax.jit(plain)(params, state, xs, targets)[1], FLOAT32)
