"""Settings that a user may change for a while: a learner obeys those in force at a call, not those of its first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import deep_eprop, hoisted_bptt
from tests.zoo import problem

LOW = "BF16_BF16_F32"


def program_of(learner, p, kind) -> str:
    """The program of a gradient, traced under the settings in force."""

    def gradient(params, carry, xs, targets):
        if kind == "bptt":
            return learner(p.loss_fn)(params, carry, xs, targets)[1]
        state = learner.init(params, carry, xs[0])
        if kind == "stream":
            state, y = learner.step(params, learner.step(params, state, xs[0])[0], xs[1])
            return learner.gradient(params, state, y)
        return learner.value_and_grad(p.loss_fn, segment_length=kind)(params, state, xs, targets)[1]

    return str(jax.make_jaxpr(gradient)(p.params, p.carry, p.xs, p.targets))


@pytest.mark.parametrize(
    ("options", "kind"), [({"exact": True}, 3), ({}, 1), ({"hops": 0}, 3), ({"hops": 0}, "stream"), (None, "bptt")]
)
def test_the_matmul_precision_of_the_first_call_does_not_stay(options, kind):
    p = problem("stack_2", jnp.float32, steps=6)

    learner = hoisted_bptt(p.network) if options is None else deep_eprop(p.network, **options)
    for _ in range(2):
        with jax.default_matmul_precision(LOW):
            low = program_of(learner, p, kind)
        with jax.default_matmul_precision("float32"):
            high = program_of(learner, p, kind)
        assert LOW in low
        assert LOW not in high
        assert "HIGHEST" in high


@pytest.mark.mixed_promotion
def test_promotion_and_debug_settings_of_the_first_call_do_not_stay():
    """A cell that mixes ranks works where JAX lets it, is refused where not, and works again."""

    def cell(p, h, x):
        h = jnp.tanh(h * p["w"][None] + x)[0]  # (1, 3) times (3,) in the line before would be refused too
        return h, h * jnp.ones((2, 3))

    params, carry, x = {"w": jnp.ones(3)}, jnp.zeros((2, 3)), jnp.ones((2, 3))
    learner = deep_eprop(cell)
    state = learner.init(params, carry, x)
    with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank_promotion"):
        learner.step(params, state, x)
    _, y = learner.step(params, state, x)
    assert y.shape == (2, 2, 3)
    with jax.debug_nans(True):
        assert jnp.array_equal(learner.step(params, state, x)[1], y)
