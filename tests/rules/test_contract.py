"""Rules keep the contract of a learner: step by step as in a sequence, resets, refusals, and what is read of them."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import compare_to_bptt, error_meter, stack
from deepeprop_jax.cells import indrnn, leaky_readout, leaky_rnn
from deepeprop_jax.rules import immediate, kf_rtrl, kronecker_sum, rflo, snap, uoro
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import cells, problem, start

RULES = {
    "immediate": immediate,
    "SnAp-1": lambda network: snap(network, 1),
    "RFLO": rflo,
    "UORO": uoro,
    "KF-RTRL": kf_rtrl,
    "OK": lambda network: kronecker_sum(network, 2),
}


@pytest.mark.parametrize("name", RULES)
def test_a_sequence_is_its_steps(name: str) -> None:
    """In two pieces as in one; step by step with updates of nothing between; with a reset between steps, and NaNs
    before it."""
    p = problem("stack_2", steps=5)
    learner = RULES[name](p.network)
    resets = jnp.zeros((5, 3), bool).at[(2, 3), (1, 0)].set(True)
    run = jax.jit(learner.value_and_grad(p.loss_fn))
    state = start(learner, p)
    (loss, end), grads = run(p.params, state, p.xs, p.targets, resets)
    step, gradient = jax.jit(learner.step), jax.jit(learner.gradient)
    total, losses = jax.tree.map(jnp.zeros_like, grads), 0.0
    for t in range(5):
        if t == 2:  # what an example saw before a reset may have been anything
            state = state._replace(carry=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.carry))
        state = learner.reset(state, resets[t])
        state, y = step(p.params, state, p.xs[t])
        target = jax.tree.map(lambda leaf, t=t: leaf[t], p.targets)
        value, dy = jax.value_and_grad(p.loss_fn)(y, target)
        total, losses = jax.tree.map(jnp.add, total, gradient(p.params, state, dy)), losses + value
    assert_same_gradient(total, grads, FLOAT64, name)
    np.testing.assert_allclose(losses, loss)
    assert_same_gradient(state.carry, end.carry, FLOAT64)
    assert jax.tree.structure(state) == jax.tree.structure(end)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(end)]


def test_a_stream_goes_on_where_its_piece_ended() -> None:
    p = problem("stack_2", steps=6)
    learner = uoro(p.network)
    run = jax.jit(learner.value_and_grad(lambda y, target: (p.loss_fn(y, target), y), has_aux=True))
    state, pieces = start(learner, p), []
    ((loss, ys), _), grads = run(p.params, state, p.xs, p.targets)
    for part in (slice(0, 3), slice(3, 6)):
        xs, targets = jax.tree.map(lambda leaf, part=part: leaf[part], (p.xs, p.targets))
        ((piece, outputs), state), found = run(p.params, state, xs, targets)
        pieces.append((piece, outputs, found))
    assert_same_gradient(jax.tree.map(jnp.add, pieces[0][2], pieces[1][2]), grads, FLOAT64)
    np.testing.assert_allclose(pieces[0][0] + pieces[1][0], loss)
    np.testing.assert_allclose(jnp.concatenate([pieces[0][1], pieces[1][1]]), ys)


def test_a_rule_is_compared_and_metered_as_a_learner_is() -> None:
    p = problem("stack_2", steps=6)
    learner = snap(p.network, 2)
    found = compare_to_bptt(learner, p.params, p.carry, p.xs, p.targets, p.loss_fn)
    assert found.total.relative_error < FLOAT64
    meter_of = error_meter(immediate(p.network), p.loss_fn)
    meter = meter_of.init(jax.random.key(0), p.params, p.carry, p.xs[0])
    for _ in range(2):  # two nodes, in turn
        state = start(learner, p)
        _, grads = learner.value_and_grad(p.loss_fn)(p.params, state, p.xs, p.targets)
        meter = meter_of.update(meter, p.params, state, p.xs, p.targets, grads)
        meter = meter_of.begin(meter, p.params, p.carry, p.xs[0])
    assert meter_of.error(meter).total < FLOAT64


def test_a_rule_pickles_as_its_call() -> None:
    learner = pickle.loads(pickle.dumps(kronecker_sum(stack(leaky_rnn(2), leaky_readout(1)), rank=3)))
    params, carry = learner.network.init(jax.random.key(0), jnp.zeros((2, 2), jnp.float32))
    state = learner.init(params, carry, jnp.zeros((2, 2), jnp.float32))
    assert state.traces["kronecker_sum"].numbers.U[0].shape == (2, 3, 2)


def test_what_a_rule_cannot_do_is_refused() -> None:
    x = jnp.zeros((2, 2), jnp.float32)

    def init(learner, *key):
        return learner.init(*learner.network.init(jax.random.key(0), x), x, *key)

    for rule in (kf_rtrl, kronecker_sum):
        with pytest.raises(ValueError, match=r"params at 'params/hf/kernel'.*not nn\.OptimizedLSTMCell"):
            init(rule(cells()["linen_optimized_lstm"].make()))
        with pytest.raises(ValueError, match="Write the layers of stack"):
            init(rule(stack(leaky_rnn(2), depth=2)))
    with pytest.raises(ValueError, match=r"Node 'cell': rflo needs.*hops=0"):
        conv, image = rflo(cells()["linen_conv_lstm"].make()), jnp.zeros((2, 3, 1), jnp.float32)
        params, carry = conv.network.init(jax.random.key(0), image)
        conv.step(params, conv.init(params, carry, image), image)
    with pytest.raises(ValueError, match="order must be"):
        snap(leaky_rnn(2), 0)
    with pytest.raises(ValueError, match="rank must be"):
        kronecker_sum(leaky_rnn(2), 0)
    with pytest.raises(ValueError, match=r"connected must have shape \(2, 2\)"):
        learner = snap(leaky_rnn(2), 1, connected=np.ones((3, 3), bool))
        learner.step(learner.network.init(jax.random.key(0), x)[0], init(learner), x)
    with pytest.raises(ValueError, match="immediate draws nothing"):
        init(immediate(leaky_rnn(2)), jax.random.key(0))
    with pytest.raises(ValueError, match="uoro goes step by step"):
        uoro(leaky_rnn(2)).value_and_grad(lambda y, target: 0.0, segment_length=4)
    learner, other = uoro(indrnn(2)), immediate(indrnn(2))
    params, _ = learner.network.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="the state's traces"):
        learner.step(params, init(other), x)
    with pytest.raises(ValueError, match="No step is pending"):
        learner.gradient(params, init(learner), x)
