"""Inputs and outputs of any kind: tokens, dicts, scalars, complex numbers, several leaves, plain functions."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import Cell, deep_eprop, graph, stack
from deepeprop_jax.cells import leaky_rnn
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT64, assert_same_gradient

STEPS, BATCH = 7, 3


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def complex_cell(key, features):
    """h <- a h + W u, y = h: a complex output, and a complex input for whatever is above."""

    def init(key, x):
        w = jax.lax.complex(normal(0, x.shape[-1], features), normal(1, x.shape[-1], features))
        return {"a": jnp.full(features, 0.5 + 0.3j), "w": w}, jnp.zeros((len(x), features), jnp.complex128)

    def apply(params, h, x):
        h = params["a"] * h + x.astype(complex) @ params["w"]
        return h, h

    return Cell(init, apply)


def modulus(params, carry, x):
    return carry, jnp.abs(x) ** 2 + jnp.real(x)


def scalar_cell(params, carry, x):
    carry = jnp.tanh(params["w"] * carry + params["u"] @ x)
    return carry, carry


def scalar_init(key, x):
    return {"w": jnp.asarray(0.4), "u": 0.5 + normal(2, x.shape[-1])}, jnp.zeros(len(x))


def several(params, carry, x):
    """Outputs of all kinds: an array, a scalar, an integer."""
    carry = jnp.tanh(x["drive"] @ params + carry)
    return carry, {"h": carry, "sum": carry.sum(), "count": (carry > 0).sum(), "code": x["token"]}


def several_init(key, x):
    return normal(3, 2, 4), jnp.zeros((len(x["drive"]), 4))


def dict_loss(y, target):
    return target * (jnp.sum(y["h"] ** 2) + jnp.sum(y["sum"] ** 3))


def array_loss(y, target):
    return target * jnp.sum(jnp.abs(y - 0.1) ** 2)


TOKENS = jax.random.randint(jax.random.key(9), (STEPS, BATCH), 0, 5)
VECTORS = normal(7, STEPS, BATCH, 2)
EMBED = nn.Embed(5, 3, param_dtype=jnp.float64)
COMPLEX_DENSE = nn.Dense(2, param_dtype=jnp.complex128)

CASES = {
    "tokens": (lambda: stack(EMBED, leaky_rnn(4, param_dtype=jnp.float64)), TOKENS, array_loss),
    "complex between and out": (lambda: stack(complex_cell(0, 3), COMPLEX_DENSE), VECTORS, array_loss),
    "complex into a recurrent layer": (
        lambda: stack(complex_cell(0, 3), Cell(lambda k, x: ((), ()), modulus), leaky_rnn(2, param_dtype=jnp.float64)),
        VECTORS,
        array_loss,
    ),
    "scalar carry and output": (lambda: Cell(scalar_init, scalar_cell), VECTORS, array_loss),
    "dict in, several leaves out": (
        lambda: Cell(several_init, several), {"drive": VECTORS, "token": TOKENS}, dict_loss
    ),
    "a node without parameters or carry": (
        lambda: graph(
            {
                "low": (leaky_rnn(3, param_dtype=jnp.float64), "input"),
                "square": (Cell(lambda k, x: ((), ()), lambda p, h, x: (h, x["a"] * x["b"])), {"a": "low", "b": "low"}),
                "high": (leaky_rnn(2, param_dtype=jnp.float64), ("square", "low")),
            },
            outputs=("high", "square"),
        ),
        VECTORS,
        lambda y, target: target * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_exact_equals_bptt(case):
    make, xs, loss_fn = CASES[case]
    network = make()
    x = jax.tree.map(lambda leaf: leaf[0], xs)
    params, carry = network.init(jax.random.key(0), x)
    learner = deep_eprop(network, exact=True)
    state, weights = learner.init(params, carry, x), normal(5, STEPS)
    (loss, _), grads = jax.jit(learner.value_and_grad(loss_fn))(params, state, xs, weights)
    (loss_bptt, _), needed = jax.jit(bptt(network, loss_fn))(params, carry, xs, weights)
    assert jnp.allclose(loss, loss_bptt, rtol=FLOAT64)
    assert_same_gradient(grads, needed, FLOAT64, case)
    # The same through step and gradient, with dy as jax.grad gives it.
    step, gradient = jax.jit(learner.step), jax.jit(learner.gradient)
    total = jax.tree.map(jnp.zeros_like, params)
    for t in range(STEPS):
        state, y = step(params, state, jax.tree.map(lambda leaf, t=t: leaf[t], xs))
        dy = jax.grad(loss_fn, allow_int=True)(y, weights[t])
        total = jax.tree.map(jnp.add, total, gradient(params, state, dy))
    assert_same_gradient(total, needed, FLOAT64, case)


def test_modules_work_as_they_stand():
    for network in (nn.GRUCell(64), stack(nn.GRUCell(64), nn.Dense(10))):
        learner = deep_eprop(network)
        xs = normal(0, STEPS, BATCH, 5, dtype=jnp.float32)
        params, carry = learner.network.init(jax.random.key(0), xs[0])
        state = learner.init(params, carry, xs[0])
        run = jax.jit(learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2)))
        (loss, _), grads = run(params, state, xs, jnp.zeros(STEPS, jnp.float32))
        assert jnp.isfinite(loss)
        assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads))


def test_a_plain_function_with_params_and_carry_of_its_user():
    def cell_fn(params, carry, x):
        carry = jnp.tanh(carry @ params["w"] + x)
        return carry, carry

    learner = deep_eprop(cell_fn, exact=True)
    params, carry = {"w": 0.5 * normal(1, 2, 2)}, normal(2, BATCH, 2)
    state = learner.init(params, carry, VECTORS[0])
    _, grads = jax.jit(learner.value_and_grad(array_loss))(params, state, VECTORS, jnp.ones(STEPS))
    _, needed = jax.jit(bptt(learner.network, array_loss))(params, carry, VECTORS, jnp.ones(STEPS))
    assert_same_gradient(grads, needed, FLOAT64)


@pytest.mark.parametrize("params", [{}, {"count": jnp.arange(2)}], ids=["none", "integers"])
def test_layers_without_real_parameters(params):
    deep = stack(Cell(lambda k, x: (params, x), lambda p, h, x: (0.5 * h + x, jnp.sin(0.5 * h + x))), depth=1)
    network = stack(leaky_rnn(3, param_dtype=jnp.float64), stack(deep, leaky_rnn(2, param_dtype=jnp.float64)))
    check_against_bptt(network, VECTORS)


def test_one_layer_of_depth_below_a_recurrent_layer():
    layer = leaky_rnn(3, param_dtype=jnp.float64)
    check_against_bptt(stack(stack(nn.Dense(3, param_dtype=jnp.float64), stack(layer, depth=1)), layer), VECTORS)


def check_against_bptt(network, xs):
    params, carry = network.init(jax.random.key(0), xs[0])
    learner = deep_eprop(network, exact=True)
    state, weights = learner.init(params, carry, xs[0]), normal(5, STEPS)
    (_, _), grads = jax.jit(learner.value_and_grad(array_loss))(params, state, xs, weights)
    (_, _), needed = jax.jit(bptt(network, array_loss))(params, carry, xs, weights)
    assert_same_gradient(grads, needed, FLOAT64)
