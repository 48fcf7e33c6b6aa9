"""Steps that are not valid: value and gradient belong together where the loss has one number per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop, hoisted_bptt
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import problem, start


def losses(y, target):
    """One per example; for an example that is padded, not a number."""
    return target["weight"] * jnp.log(jnp.sum((y - target["value"]) ** 2, axis=-1)) + target["padding"]


@pytest.mark.parametrize("length", [1, 4, None])
def test_losses_per_example_are_those_of_the_valid_ones(length):
    p = problem("stack_2")
    valid = jnp.asarray(np.random.default_rng(0).random((12, 3)) < 0.6)
    targets = p.targets | {"padding": jnp.where(valid, 0.0, jnp.nan)}

    def needed(params):
        """The loss of valid steps, by a scan that knows nothing of the library."""

        def step(carry, t):
            carry_t, y = jax.vmap(p.network.apply, (None, 0, 0))(params, carry, p.xs[t])
            held = jax.tree.map(lambda a, b: jnp.where(valid[t, :, None], a, b), carry_t, carry)
            target = jax.tree.map(lambda leaf: leaf[t], targets) | {"padding": 0.0}
            return held, valid[t].astype(float) @ losses(y, target)

        return jax.lax.scan(step, p.carry, jnp.arange(12))[1].sum()

    value, grads = jax.jit(jax.value_and_grad(needed))(p.params)
    learner = deep_eprop(p.network, exact=True)
    cured = (lambda y, target: jnp.where(target[1], losses(y, target[0]), 0).sum(), (targets, valid))
    for loss_fn, given in ((losses, targets), cured):
        run = jax.jit(learner.value_and_grad(loss_fn, segment_length=length))
        (seen, _), seen_grads = run(p.params, start(learner, p), p.xs, given, valid=valid)
        assert jnp.allclose(seen, value, rtol=FLOAT64)
        assert_same_gradient(seen_grads, grads, FLOAT64)
        if length is None:
            for other in (hoisted_bptt(p.network)(loss_fn), bptt(p.network, loss_fn)):
                (seen, _), seen_grads = jax.jit(other)(p.params, p.carry, p.xs, given, valid=valid)
                assert jnp.allclose(seen, value, rtol=FLOAT64)
                assert_same_gradient(seen_grads, grads, FLOAT64)


def test_losses_per_example_without_flags_are_summed_and_aux_is_kept():
    p = problem("linen_gru")
    learner = deep_eprop(p.network)

    def by_example(y, target):
        return jnp.sum((y - target["value"]) ** 2, axis=-1), y

    def scalar(y, target):
        return jnp.sum((y - target["value"]) ** 2), y

    found = [
        jax.jit(learner.value_and_grad(loss_fn, segment_length=4, has_aux=True))(
            p.params, start(learner, p), p.xs, p.targets
        )
        for loss_fn in (by_example, scalar)
    ]
    ((value, aux), _), grads = found[0]
    ((needed, needed_aux), _), needed_grads = found[1]
    assert value.shape == ()
    assert jnp.allclose(value, needed, rtol=FLOAT64)
    assert jnp.array_equal(aux, needed_aux)
    assert_same_gradient(grads, needed_grads, FLOAT64)
