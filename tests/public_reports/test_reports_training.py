"""Situations from public reports in training: narrow dtypes, second compilations, and optax's wrappers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from deepeprop_jax import Cell, deep_eprop, stack
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT32, FLOAT64, SAME, assert_same_gradient, relative_errors
from tests.public_reports.situations import BATCH, INPUTS, STEPS, TARGETS, UNITS, loss_fn, numbers

KEY = jax.random.key(0)
BF16 = 0.02
"""Some rounding errors of 2^-9: XLA may keep what is narrow in a wider register, and does so here and not there."""


def avals(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.result_type(leaf), leaf.weak_type), tree)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def alone(params, h, x):
    """Units without lateral weights, in float32 whatever x is."""
    h = jnp.tanh(params["u"] * h + x.astype(h.dtype) @ params["W"])
    return h, h


def alone_init(key, x):
    params = {"u": numbers(5, UNITS), "W": numbers(6, INPUTS, UNITS)}
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, numbers(7, BATCH, UNITS)))


@pytest.mark.parametrize(
    ("recurrent", "mode"),
    # Traces with dense rows, and local ones, which wait as factors: exact, both are BPTT.
    [(nn.SimpleCell(UNITS, dtype=jnp.float32), {"exact": True, "hops": 0}), (Cell(alone_init, alone), {"hops": 0})],
    ids=["dense", "local"],
)
@pytest.mark.parametrize("narrow", ["input", "output", "both"])
def test_steps_in_a_scan_keep_every_dtype(recurrent, mode, narrow):
    """bfloat16 in and float32 out, the reverse, and both narrow; parameters and carry are float32."""
    x_dtype = jnp.float32 if narrow == "output" else jnp.bfloat16
    y_dtype = jnp.float32 if narrow == "input" else jnp.bfloat16
    learner = deep_eprop(stack(recurrent, nn.Dense(2, dtype=y_dtype)), **mode)
    xs, targets = numbers(1, STEPS, BATCH, INPUTS).astype(x_dtype), TARGETS.astype(jnp.float32)
    params, carry = learner.network.init(KEY, xs[0].astype(jnp.float32))

    def loss(y, target):
        return loss_fn(y.astype(jnp.float32), target).astype(jnp.float32)

    @jax.jit
    def online(params, state, xs, targets):
        def body(loop, inputs):
            state, total = loop
            state, y = learner.step(params, state, inputs[0])
            grads = learner.gradient(params, state, jax.grad(loss)(y, inputs[1]))
            return (state, jax.tree.map(jnp.add, total, grads)), y

        # The carry of a scan must come back in its own dtypes, weak types included.
        loop, ys = jax.lax.scan(body, (state, jax.tree.map(jnp.zeros_like, params)), (xs, targets))
        return *loop, ys

    state = learner.init(params, carry, xs[0])
    end, grads, ys = online(params, state, xs, targets)
    assert avals(end) == avals(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(end.traces)} == {jnp.dtype(jnp.float32)}
    assert ys.dtype == y_dtype
    _, needed = jax.jit(bptt(learner.network, loss))(params, carry, xs, targets)
    assert_same_gradient(grads, needed, FLOAT32 if narrow == "input" else BF16)


@pytest.mark.mixed_promotion
def test_a_carry_that_would_change_its_dtype_is_refused():
    """Flax's cells of ``dtype=bfloat16`` start from a float32 carry; a scan over the cell fails too."""
    learner = deep_eprop(nn.SimpleCell(UNITS, dtype=jnp.bfloat16, param_dtype=jnp.float32))
    x = numbers(1, BATCH, INPUTS).astype(jnp.float32)
    params, carry = learner.network.init(KEY, x)
    with pytest.raises(ValueError, match=r"given float32\[3\], returned bfloat16\[3\].*Give an initial carry of the"):
        learner.init(params, carry, x)
    state = learner.init(params, carry.astype(jnp.bfloat16), x)
    assert jax.eval_shape(learner.step, params, state, x)[0].carry.dtype == jnp.bfloat16


# --- one compilation -------------------------------------------------------------------------------------------------


def counted(params, carry, x):
    """A counter of steps, and a gain of Python numbers beside it: weakly typed where the user makes it so."""
    h, gain, count = carry
    leak = 1 / (2 + count.astype(h.dtype))
    h = (1 - leak) * h + leak * jnp.tanh(x @ params["W"] + gain * (h @ params["U"]))
    return (h, 0.9 * gain, count + 1), h


@pytest.mark.parametrize("weak", [False, True], ids=["strong", "weak"])
def test_counters_and_weak_types_compile_once(weak):
    learner = deep_eprop(Cell(None, counted))
    params = {"W": numbers(2, INPUTS, UNITS), "U": numbers(3, UNITS, UNITS)}
    gain = jnp.full((BATCH, 1), 0.5, None if weak else jnp.float64)
    count = jnp.full(BATCH, 0, None if weak else jnp.int32)
    assert gain.weak_type == count.weak_type == weak
    xs = numbers(1, STEPS, BATCH, INPUTS)
    state = learner.init(params, (numbers(4, BATCH, UNITS), gain, count), xs[0])
    seen = {"step": 0, "gradient": 0, "run": 0}

    def once(name, function):
        def traced(*args):
            seen[name] += 1
            return function(*args)

        return jax.jit(traced)

    step, gradient = once("step", learner.step), once("gradient", learner.gradient)
    run = once("run", learner.value_and_grad(loss_fn, segment_length=3))
    for x in xs[:3]:
        state, y = step(params, state, x)
        gradient(params, state, y)
    for _ in range(2):
        (_, state), _ = run(params, state, xs, TARGETS)
    step(params, state, xs[0])
    assert seen == {"step": 1, "gradient": 1, "run": 1}
    np.testing.assert_array_equal(state.carry[2], 3 + 2 * STEPS)


# --- optax -----------------------------------------------------------------------------------------------------------


def two_layers():
    learner = deep_eprop(stack(nn.SimpleCell(UNITS), nn.SimpleCell(2)))
    xs = numbers(1, STEPS, BATCH, INPUTS)
    params, carry = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64), learner.network.init(KEY, xs[0].astype(jnp.float32))
    )
    run = jax.jit(learner.value_and_grad(loss_fn, segment_length=3))
    return learner, params, learner.init(params, carry, xs[0]), xs, run


@pytest.mark.mixed_promotion
def test_multi_steps_clips_the_sum_over_the_pieces():
    """k pieces of a stream, one update: that of the whole sequence's gradient, clipped."""
    learner, params, state, xs, run = two_layers()
    pieces = ((0, 3), (3, 6), (6, 7))
    _, whole = run(params, state, xs, TARGETS)
    norm = jnp.linalg.norm(ravel_pytree(whole)[0])
    inner = optax.chain(optax.clip_by_global_norm(0.5 * float(norm)), optax.adam(0.1))
    needed, _ = inner.update(whole, inner.init(params))
    optimiser = optax.MultiSteps(inner, every_k_schedule=len(pieces), use_grad_mean=False)

    @jax.jit
    def train(params, optimiser_state, state, xs, targets):
        (_, state), grads = learner.value_and_grad(loss_fn, segment_length=3)(params, state, xs, targets)
        updates, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return optax.apply_updates(params, updates), optimiser_state, state, grads

    new, optimiser_state = params, optimiser.init(params)
    for number, (a, b) in enumerate(pieces):
        assert number == 0 or jax.tree.all(jax.tree.map(lambda old, now: bool((old == now).all()), params, new))
        new, optimiser_state, state, grads = train(new, optimiser_state, state, xs[a:b], TARGETS[a:b])
        # A single piece is not the whole: its own clip would be another update.
        assert max(relative_errors(grads, whole).values()) > 0.1
    assert bool(optimiser.has_updated(optimiser_state))
    assert_same_gradient(new, optax.apply_updates(params, needed), FLOAT64)


@pytest.mark.mixed_promotion
def test_multi_transform_by_layer():
    """Each layer its own optimiser, by labels that are a prefix of params; a frozen layer stays."""
    _, params, state, xs, run = two_layers()
    _, grads = run(params, state, xs, TARGETS)
    rules = {"slow": optax.sgd(0.01), "fast": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))}
    optimiser = optax.multi_transform(rules, ("slow", "fast"))
    updates, _ = jax.jit(optimiser.update)(grads, optimiser.init(params), params)
    for layer, rule in enumerate(("slow", "fast")):
        needed, _ = rules[rule].update(grads[layer], rules[rule].init(params[layer]), params[layer])
        assert_same_gradient(updates[layer], needed, SAME, rule)

    frozen = optax.multi_transform(rules | {"frozen": optax.set_to_zero()}, ("frozen", "fast"))
    updates, _ = frozen.update(grads, frozen.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates[0]))
    # The same with ``trainable``, which also takes the frozen layer's trace.
    learner = deep_eprop(stack(nn.SimpleCell(UNITS), nn.SimpleCell(2)), trainable=(False, True))
    state = learner.init(params, state.carry, xs[0])
    _, seen = jax.jit(learner.value_and_grad(loss_fn, segment_length=3))(params, state, xs, TARGETS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(seen[0]))
    assert_same_gradient(seen[1], grads[1], SAME)
