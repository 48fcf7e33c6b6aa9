"""Leaves of every kind: Python numbers, weakly typed arrays, integers, complex parameters."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepeprop_jax import Cell, analyse, compare_to_bptt, deep_eprop, hoisted_bptt, stack
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT64, assert_same_gradient

STEPS, BATCH, UNITS = 4, 3, 2
XS = jax.random.normal(jax.random.key(0), (STEPS, BATCH, UNITS))


def loss_fn(y, target):
    return jnp.mean((y - target) ** 2)


def cell(params, carry, x):
    """An int counter, a complex and a key leaf, and leaves that the cell returns weakly typed."""
    h = jnp.tanh(params["w"] * carry["h"] + params["gain"] * (x @ params["u"])) + 0.1 * carry["gate"]
    return {
        "h": h,
        "gate": jnp.where(x[0] > 0, 1.0, 0.0),
        "spike": jnp.where(h > 0, 1.0, 0.0),
        "count": jnp.where(carry["count"] > 2, 0, 7),
        "z": carry["z"] * (0.5 + 0.2j) + h.astype(complex),
        "key": jax.random.split(carry["key"])[0],
    }, h + jnp.real(carry["z"])


def weak(shape, value):
    return jnp.broadcast_to(jnp.asarray(value), shape)


def start():
    """Params with a Python number and a weakly typed array, and a carry of weakly typed leaves."""
    params = {"w": 0.5, "gain": jnp.asarray(1.0), "u": jnp.full((UNITS, UNITS), 0.3)}
    carry = {
        "h": weak((BATCH, UNITS), 0.0),
        "gate": weak((BATCH,), 0.0),
        "spike": weak((BATCH, UNITS), 0.0),
        "count": weak((BATCH,), 0),
        "z": weak((BATCH, UNITS), 0j),
        "key": jax.random.split(jax.random.key(1), BATCH),
    }
    return params, carry


@pytest.fixture(autouse=True)
def fresh_trace_counter():
    """It knows a function by its source, not by its identity."""
    chex.clear_trace_counter()
    yield
    chex.clear_trace_counter()


def is_weak(leaf):
    return jax.typeof(leaf).weak_type


@pytest.mark.parametrize(
    ("layers", "length", "mode"),
    [(1, 2, {"hops": 0}), (2, 1, {}), (1, 3, {"exact": True}), (1, 2, {"rank": 1})],
    ids=["factors", "across nodes", "exact", "rank"],
)
def test_weakly_typed_leaves_compile_once(layers, length, mode):
    """From the first call on, the state that goes in has the type of the one that comes out."""
    params, carry = start()
    network, learner = cell, deep_eprop(cell, **mode)
    if layers > 1:
        network = stack(*[cell] * layers)
        learner, params, carry = deep_eprop(network, **mode), (params,) * layers, (carry,) * layers
    assert any(map(is_weak, jax.tree.leaves(carry)))
    xs, targets, where = weak((STEPS, BATCH, UNITS), 0.5), jnp.zeros(STEPS), jnp.array([True, False, False])
    once = {
        name: jax.jit(chex.assert_max_traces(function, n=1))
        for name, function in {
            "init": learner.init,
            "step": learner.step,
            "gradient": learner.gradient,
            "run": learner.value_and_grad(loss_fn, segment_length=length),
            "reset": learner.reset,
        }.items()
    }
    state = once["init"](params, carry, xs[0])
    chex.assert_trees_all_equal(jax.tree.map(is_weak, state), jax.tree.map(lambda _: False, state))
    for x in xs:
        state, y = once["step"](params, state, x)
        once["gradient"](params, state, y)
        state = once["reset"](state, where)
    for _ in range(2):
        (_, state), grads = once["run"](params, state, xs, targets)
        assert not any(map(is_weak, jax.tree.leaves((state, grads))))
    once["step"](params, once["reset"](state, where), xs[0])


def test_hoisted_bptt_returns_a_carry_of_the_type_it_is_given():
    params, carry = start()
    run = jax.jit(chex.assert_max_traces(hoisted_bptt(cell)(loss_fn), n=1))
    carry = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype) if is_weak(leaf) else leaf, carry)
    for _ in range(2):
        (_, carry), _ = run(params, carry, XS, jnp.zeros(STEPS))


def leaky(params, h, x):
    h = params["leak"] * h + jnp.tanh(x @ params["w"])
    return h, params["gain"] * h


def test_a_python_number_is_an_array_everywhere():
    numbers = {"leak": 0.5, "gain": np.float64(2.0), "w": np.full((UNITS, UNITS), 0.3)}
    arrays = jax.tree.map(jnp.asarray, numbers)
    carry, targets, x = np.zeros((BATCH, UNITS)), jnp.zeros(STEPS), XS[0]
    learner = deep_eprop(leaky)
    state = learner.init(numbers, carry, np.asarray(x))
    chex.assert_trees_all_equal(state, learner.init(arrays, jnp.asarray(carry), x))
    (state, y), needed = learner.step(numbers, state, np.asarray(x)), learner.step(arrays, state, x)
    chex.assert_trees_all_equal((state, y), needed)
    chex.assert_trees_all_equal(learner.gradient(numbers, state, y), learner.gradient(arrays, state, y))
    run = learner.value_and_grad(loss_fn)
    (value, end), grads = run(numbers, state, np.asarray(XS), targets)
    chex.assert_trees_all_equal(((value, end), grads), run(arrays, state, XS, targets))
    (_, _), exact = hoisted_bptt(leaky)(loss_fn)(numbers, carry, np.asarray(XS), targets)
    _, needed = bptt(learner.network, loss_fn)(arrays, jnp.asarray(carry), XS, targets)
    assert_same_gradient(exact, needed, FLOAT64)
    assert str(analyse(leaky, numbers, carry, np.asarray(x))) == str(analyse(leaky, arrays, jnp.asarray(carry), x))
    assert learner.plan(numbers, carry, np.asarray(x)) is learner.plan(arrays, jnp.asarray(carry), x)
    assert compare_to_bptt(learner, numbers, carry, np.asarray(XS), targets, loss_fn).total.relative_error < FLOAT64


@pytest.mark.mixed_promotion
def test_integer_params_have_no_gradient_and_are_named():
    params = {"leak": jnp.asarray(0.5), "gain": 2, "w": jnp.ones((UNITS, UNITS), jnp.int32)}
    carry, targets = jnp.zeros((BATCH, UNITS)), jnp.zeros(STEPS)
    learner = deep_eprop(leaky)
    with pytest.warns(UserWarning, match=r"'w' are int32\[2, 2\]: constants, with a zero gradient.*trainable") as seen:
        state = learner.init(params, carry, XS[0])
    assert len(seen) == 2
    masked = deep_eprop(leaky, trainable={"leak": True, "gain": False, "w": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (_, _), grads = learner.value_and_grad(loss_fn)(params, state, XS, targets)
        masked.init(params, carry, XS[0])
        deep_eprop(leaky).init({"leak": True, "gain": 2.0, "w": 1.0 * params["w"]}, carry, XS[0])
    assert grads["w"].dtype == jnp.int32 and not grads["w"].any() and grads["leak"] != 0


@pytest.mark.mixed_promotion
def test_the_line_of_the_overview_lets_optax_train_complex_parameters():
    """Without it the loss rises."""
    page = (Path(__file__).parents[2] / "docs" / "api_overview.md").read_text()
    (line,) = re.findall(r"`(grads = jax\.tree\.map\(.*conj, grads\))`", page)

    def apply(params, h, x):
        h = params["a"] * h + x @ params["w"]
        return h, jnp.real(h @ params["out"])

    keys = jax.random.split(jax.random.key(1), 4)

    def normal(key, *shape):
        return 0.5 * jax.random.normal(key, shape, jnp.complex128)

    params = {
        "a": 0.7 * jnp.exp(1j * jnp.arange(3.0).astype(complex)),
        "w": normal(keys[0], UNITS, 3),
        "out": normal(keys[1], 3),
    }
    learner = deep_eprop(Cell(lambda key, x: (params, jnp.zeros((len(x), 3), complex)), apply))
    carry, targets = jnp.zeros((BATCH, 3), complex), jax.random.normal(keys[2], (STEPS, BATCH))
    state, optimiser = learner.init(params, carry, XS[0]), optax.adam(2e-2)
    run = learner.value_and_grad(loss_fn)

    def train(change):
        def update(loop, _):
            params, optimiser_state = loop
            (loss, _), grads = run(params, state, XS, targets)
            updates, optimiser_state = optimiser.update(change(grads), optimiser_state)
            return (optax.apply_updates(params, updates), optimiser_state), loss

        return jax.jit(lambda: jax.lax.scan(update, (params, optimiser.init(params)), None, 60)[1])()

    def by_readme(grads):
        names = {"grads": grads, "jax": jax}
        exec(line, names)
        return names["grads"]

    losses, raw = train(by_readme), train(lambda grads: grads)
    assert losses[-1] < 0.5 * losses[0]
    assert raw[-1] > 2 * raw[0]
