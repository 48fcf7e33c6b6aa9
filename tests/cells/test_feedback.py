"""A dense layer with backward weights of its own: what goes back, and its gradients in a deep network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop, stack
from deepeprop_jax.cells import feedback_dense, leaky_rnn
from deepeprop_jax.reference import bptt
from tests.cells.test_cells import EXACT
from tests.gradients import FLOAT64, assert_same_gradient

KEY = jax.random.key(3)
DOUBLE = {"param_dtype": jnp.float64}


@pytest.mark.parametrize("feedback", ["random", "sign", "learnt"])
def test_a_cotangent_goes_back_by_the_feedback_weights(feedback):
    cell = feedback_dense(4, feedback=feedback, **DOUBLE)
    x, dy = jax.random.normal(KEY, (3, 5)), jax.random.normal(jax.random.key(4), (3, 4))
    params, _ = cell.init(KEY, x)
    y, pull = jax.vjp(lambda p, x: jax.vmap(cell.apply, (None, None, 0))(p, (), x)[1], params, x)
    grads, dx = pull(dy)
    w = np.asarray(params["kernel"])
    back = np.sign(w) * np.abs(w).mean() if feedback == "sign" else np.asarray(params["feedback"])
    np.testing.assert_allclose(y, x @ w, **EXACT)
    np.testing.assert_allclose(dx, dy @ back.T, **EXACT)
    np.testing.assert_allclose(grads["kernel"], x.T @ dy, **EXACT)
    if feedback != "sign":
        needed = grads["kernel"] if feedback == "learnt" else np.zeros((5, 4))
        np.testing.assert_allclose(grads["feedback"], needed, **EXACT)


def test_every_mode_goes_by_it():
    network = stack(leaky_rnn(3, **DOUBLE), feedback_dense(3, **DOUBLE), leaky_rnn(2, **DOUBLE))
    xs = jax.random.normal(KEY, (8, 3, 2))
    params, carry = network.init(KEY, xs[0])
    right = jax.jit(bptt(network, loss_fn))(params, carry, xs, jnp.zeros(8))[1]
    for length in (3,):
        learner = deep_eprop(network, exact=True)
        run = jax.jit(learner.value_and_grad(loss_fn, segment_length=length))
        assert_same_gradient(run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(8))[1], right, FLOAT64)
    forward = bptt(stack(leaky_rnn(3, **DOUBLE), lambda p, h, x: (h, x @ p["kernel"]), leaky_rnn(2, **DOUBLE)), loss_fn)
    other = forward(params, carry, xs, jnp.zeros(8))[1]
    assert jnp.abs(other[0]["input_kernel"] - right[0]["input_kernel"]).max() > 1e-3


def loss_fn(y, target):
    return jnp.sum(jnp.tanh(y) ** 2)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="one of 'random', 'sign', 'learnt'; seen 'none'"):
        feedback_dense(4, feedback="none")
