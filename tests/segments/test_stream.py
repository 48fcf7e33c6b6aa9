"""One step at a time, a whole sequence, and pieces of it give equal gradients; parameters may change between steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepeprop_jax import deep_eprop
from deepeprop_jax.reference import bptt, localised, stop_gradient_oracle
from tests.gradients import FLOAT64, SAME, assert_same_gradient, relative_errors
from tests.zoo import problem, start

EXACT, DEEP, OWN = {"exact": True}, {"exact": False}, {"exact": False, "hops": 0}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("stack_3", "depth_4_between")]
CASES = [
    *((name, mode) for name in ("linen_lstm", "graph_two_outputs") for mode in (EXACT, DEEP, OWN)),
    *(("depth_4", DEEP), ("depth_4", OWN), ("lru", DEEP)),
    *(pytest.param(*param.values, mode, marks=pytest.mark.slow) for param in SLOW for mode in (EXACT, DEEP, OWN)),
]


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def at(tree, t):
    return jax.tree.map(lambda leaf: leaf[t], tree)


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


@pytest.mark.parametrize(("name", "mode"), CASES, ids=str)
def test_steps_pieces_and_whole_agree(name, mode):
    p = problem(name)
    learner = deep_eprop(p.network, **mode)
    beginning = start(learner, p)
    run = jax.jit(learner.value_and_grad(p.loss_fn))
    (loss, end), whole = run(p.params, beginning, p.xs, p.targets)

    state, total, loss_of_pieces = beginning, None, 0.0
    for a, b in ((0, 1), (1, 5), (5, 12)):
        piece = jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], (p.xs, p.targets))
        (value, state), grads = run(p.params, state, *piece)
        total = grads if total is None else add(total, grads)
        loss_of_pieces += value
    assert_same_gradient(total, whole, SAME, "pieces")
    assert jnp.allclose(loss_of_pieces, loss, rtol=SAME)
    assert_same_gradient(state.traces, end.traces, SAME, "traces after the pieces")

    step, gradient, dy_of = jax.jit(learner.step), jax.jit(learner.gradient), jax.jit(jax.grad(p.loss_fn))
    state, total = beginning, None
    for t in range(12):
        state, y = step(p.params, state, at(p.xs, t))
        dy = dy_of(y, at(p.targets, t))
        grads = gradient(p.params, state, dy)
        total = grads if total is None else add(total, grads)
    assert_same_gradient(total, whole, SAME, "steps")
    # The last step's update is still pending; value_and_grad applies it before it goes on.
    again = jax.tree.map(lambda leaf: leaf[:1], (p.xs, p.targets))  # of one step, as the first piece
    _, after_steps = run(p.params, state, *again)
    _, after_whole = run(p.params, end, *again)
    assert_same_gradient(after_steps, after_whole, SAME, "going on")


@pytest.mark.parametrize("name", ["linen_gru", "stack_3"])
@pytest.mark.parametrize("exact", [True, False])
def test_each_steps_gradient_is_that_of_its_own_parameters_shifted_together(name, exact):
    """gradient at step t = d/d delta at 0 of L_t, where every step s ran with its own theta_s + delta."""
    p = problem(name, steps=4)
    learner = deep_eprop(p.network, exact=exact)
    # The oracle's cell: in deep e-prop the localised one, layer by layer.
    layers = [pair if exact else localised(pair) for pair in p.pairs]

    def apply(params, carry, x):
        if exact:
            return p.network.apply(params, carry, x)
        if name == "linen_gru":
            return layers[0](params, carry, x)
        new = []
        for layer, layer_params, layer_carry in zip(layers, params, carry, strict=True):
            carry_t, x = layer(layer_params, layer_carry, x)
            new.append(carry_t)
        return tuple(new), x

    @jax.jit
    @jax.grad
    def oracle(delta, history, t):
        """Of L_t; ``history`` holds every step's parameters, of which those after t do not matter."""

        def body(carry, step):
            params, x, target = step
            carry, y = jax.vmap(apply, (None, 0, 0))(add(params, delta), carry, x)
            return carry, p.loss_fn(y, target)

        return jax.lax.scan(body, p.carry, (history, p.xs, p.targets))[1][t]

    step, gradient, dy_of = jax.jit(learner.step), jax.jit(learner.gradient), jax.jit(jax.grad(p.loss_fn))
    for rate in (0.0, 0.1):  # fixed parameters, and optax between the steps
        optimizer = optax.sgd(rate)
        params, opt_state, state, history = p.params, optimizer.init(p.params), start(learner, p), []
        for t in range(4):
            history = (history[:t] + [params] * 4)[:4]
            state, y = step(params, state, at(p.xs, t))
            grads = gradient(params, state, dy_of(y, at(p.targets, t)))
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)
            needed = oracle(jax.tree.map(jnp.zeros_like, params), stacked, t)
            assert_same_gradient(grads, needed, FLOAT64, f"rate {rate}, step {t}")
            updates, opt_state = optimizer.update(grads, opt_state)
            params = optax.apply_updates(params, updates)


def test_gradient_is_linear_in_dy_repeatable_and_vmaps():
    p = problem("graph_skip")
    learner = deep_eprop(p.network)
    state = start(learner, p)
    step = jax.jit(learner.step)
    for t in range(3):
        state, y = step(p.params, state, at(p.xs, t))
    dys = jax.random.normal(jax.random.key(0), (4, *y.shape), y.dtype)
    many = jax.jit(jax.vmap(learner.gradient, (None, None, 0)))(p.params, state, dys)
    gradient = jax.jit(learner.gradient)
    for i in range(4):
        assert_same_gradient(at(many, i), gradient(p.params, state, dys[i]), SAME)
    combined = gradient(p.params, state, 2 * dys[0] - dys[1])
    by_hand = jax.tree.map(lambda leaf: 2 * leaf[0] - leaf[1], many)
    assert_same_gradient(combined, by_hand, FLOAT64)


@pytest.mark.parametrize("name", ["graph_two_outputs", "depth_4", "counter_and_key", *SLOW])
@pytest.mark.parametrize("exact", [True, False])
def test_resets_and_valid(name, exact):
    p = problem(name)
    learner = deep_eprop(p.network, exact=exact)
    oracle = (
        bptt(p.network, p.loss_fn)
        if exact
        else stop_gradient_oracle(p.network, p.loss_fn, p.pairs, localise=True, hops=None)
    )
    run, reference = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=4)), jax.jit(oracle)
    random = np.random.default_rng(0)
    resets, valid = jnp.asarray(random.random((12, 3)) < 0.2), jnp.asarray(random.random((12, 3)) < 0.7)
    resets = resets.at[0, 1].set(True)
    state = start(learner, p)
    alone = () if name in ("graph_two_outputs", "depth_4") else ({"resets": resets}, {"valid": valid})
    for flags in (*alone, {"resets": resets, "valid": valid}):
        (loss, _), grads = run(p.params, state, p.xs, p.targets, **flags)
        (loss_needed, _), needed = reference(p.params, p.carry, p.xs, p.targets, **flags)
        assert jnp.allclose(loss, loss_needed, rtol=FLOAT64)
        assert_same_gradient(grads, needed, FLOAT64, str(list(flags)))
        for shift in (-1, 1):  # one step early or late is another gradient
            shifted = {key: jnp.roll(flag, shift, axis=0) for key, flag in flags.items()}
            _, wrong = reference(p.params, p.carry, p.xs, p.targets, **shifted)
            assert max(relative_errors(grads, wrong).values()) > 1e-3


def test_resets_in_a_stream():
    """reset() between steps is what resets does before a step, and drops the pending update."""
    p = problem("graph_skip")
    learner = deep_eprop(p.network)
    run = jax.jit(learner.value_and_grad(p.loss_fn))
    resets = jnp.zeros((12, 3), bool).at[5, 1].set(True)
    state = start(learner, p)
    (_, end), whole = run(p.params, state, p.xs, p.targets, resets=resets)
    total, dy_of = None, jax.jit(jax.grad(p.loss_fn))
    step, gradient, reset = jax.jit(learner.step), jax.jit(learner.gradient), jax.jit(learner.reset)
    for t in range(12):
        state = reset(state, resets[t])
        state, y = step(p.params, state, at(p.xs, t))
        grads = gradient(p.params, state, dy_of(y, at(p.targets, t)))
        total = grads if total is None else add(total, grads)
    assert_same_gradient(total, whole, SAME)
    state, _ = step(p.params, state, at(p.xs, 0))
    end, _ = step(p.params, end, at(p.xs, 0))
    assert_same_gradient(state.carry, end.carry, SAME)
    assert_same_gradient(state.traces, end.traces, SAME)


def test_reset_does_not_spread_nan():
    """Traces return to zero by where: an example that overflowed leaves nothing behind."""
    p = problem("graph_skip")
    learner = deep_eprop(p.network)
    state = start(learner, p)
    spoiled = state._replace(
        carry=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.carry),
        traces=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.traces),
    )
    mended = learner.reset(spoiled, jnp.array([False, True, False]))
    assert_same_gradient((mended.carry, mended.traces), (state.carry, state.traces), SAME)
    none = jnp.zeros((12, 3), bool)
    run = jax.jit(learner.value_and_grad(p.loss_fn))
    _, grads = run(p.params, spoiled, p.xs, p.targets, resets=none.at[0, 1].set(True))
    _, needed = run(p.params, state, p.xs, p.targets, resets=none)
    assert_same_gradient(grads, needed, SAME)


def test_aux_is_stacked_over_time():
    p = problem("linen_gru")
    learner = deep_eprop(p.network)

    def loss_fn(y, target):
        return p.loss_fn(y, target), {"mean": jnp.mean(y), "y": y}

    state = learner.init(p.params, p.carry, first(p.xs))
    ((loss, aux), _), grads = jax.jit(learner.value_and_grad(loss_fn, has_aux=True))(p.params, state, p.xs, p.targets)
    (needed, _), needed_grads = jax.jit(learner.value_and_grad(p.loss_fn))(p.params, state, p.xs, p.targets)
    ys = jax.lax.scan(
        lambda carry, x: jax.vmap(learner.network.apply, (None, 0, 0))(p.params, carry, x), p.carry, p.xs
    )[1]
    assert jnp.allclose(aux["y"], ys)
    assert jnp.allclose(aux["mean"], aux["y"].mean((1, 2)))
    assert jnp.allclose(loss, needed)
    assert_same_gradient(grads, needed_grads, SAME)
