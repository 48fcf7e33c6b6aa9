"""``eligibility_trace`` against sums that are written out, against lambda-returns, and against tables by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepeprop_jax import deep_eprop, eligibility_trace, stack
from deepeprop_jax.cells import indrnn

STEPS, BATCH = 7, 3
DECAY = 0.85


def run(transform, gradients, resets=None, first=None):
    """z_t of all steps, in one scan."""
    state = transform.init(jax.tree.map(lambda leaf: leaf[0], gradients) if first is None else first)
    resets = jnp.zeros(STEPS, bool) if resets is None else resets

    def step(state, at):
        z, state = transform.update(at[0], state, reset=at[1])
        return state, z

    return jax.jit(lambda state: jax.lax.scan(step, state, (gradients, resets))[1])(state)


def written_out(gradients, decays, resets):
    """z_t = sum over s <= t of the same episode: product of the decays of s + 1 to t, times g_s."""
    found = np.zeros_like(gradients)
    for t in range(len(gradients)):
        for s in range(t + 1):
            if not any(resets[s + 1 : t + 1]):
                found[t] += np.prod(decays[s + 1 : t + 1]) * gradients[s]
    return found


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("scheduled", [False, True])
def test_equals_the_sum(scheduled):
    gradients = {"w": numbers(0, STEPS, 2, 3), "c": numbers(1, STEPS, 5) + 1j * numbers(2, STEPS, 5)}
    decays = np.linspace(0.9, 0.3, STEPS) if scheduled else np.full(STEPS, DECAY)
    decay = (lambda count: jnp.asarray(decays)[count]) if scheduled else DECAY
    resets = np.array([False, False, True, False, False, True, False])
    found = run(eligibility_trace(decay), jax.tree.map(jnp.asarray, gradients), jnp.asarray(resets))
    for name, leaf in gradients.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_allclose(found[name], written_out(leaf, decays, resets), rtol=1e-12)


def test_each_example_has_its_own_episodes():
    gradients = numbers(3, STEPS, BATCH, 2)
    resets = np.zeros((STEPS, BATCH), bool)
    resets[[2, 3, 5], [0, 1, 0]] = True
    found = run(eligibility_trace(DECAY), jnp.asarray(gradients), jnp.asarray(resets))
    for i in range(BATCH):
        expected = written_out(gradients[:, i], np.full(STEPS, DECAY), resets[:, i])
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-12)


def test_a_reset_forgets_what_is_not_finite():
    transform = eligibility_trace(DECAY)
    state = transform.init(jnp.zeros(2))
    _, state = transform.update(jnp.array([jnp.nan, 1.0]), state)
    z, _ = transform.update(jnp.array([2.0, 3.0]), state, reset=True)
    np.testing.assert_array_equal(z, [2.0, 3.0])


def test_narrow_gradients_have_a_trace_of_float32():
    gradients = jnp.full((STEPS, 1), 1 / 3, jnp.bfloat16)
    transform = eligibility_trace(0.999)
    found = run(transform, gradients)
    assert found.dtype == jnp.bfloat16 and transform.init(gradients[0]).trace.dtype == jnp.float32
    expected = written_out(np.asarray(gradients, np.float64), np.full(STEPS, 0.999), np.zeros(STEPS, bool))
    np.testing.assert_allclose(found.astype(jnp.float64), expected, rtol=2**-8)


def test_integers_keys_and_what_is_not_there_go_through():
    params = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0), "none": None, "out": optax.MaskedNode()}
    gradients = params | {"n": jnp.zeros(3, int), "key": np.zeros((), jax.dtypes.float0)}
    transform = eligibility_trace(DECAY)
    state = transform.init(params)
    for _ in range(2):
        z, state = transform.update(gradients, state)
    np.testing.assert_allclose(z["w"], 1 + DECAY)
    assert z["n"] is gradients["n"] and z["key"] is gradients["key"] and z["none"] is None
    assert sum(leaf.size for leaf in jax.tree.leaves(state.trace)) == 2


def test_in_a_chain():
    gradients = numbers(5, STEPS, 4)
    resets = np.array([False, False, False, True, False, False, False])
    chain = optax.chain(optax.clip(0.5), eligibility_trace(DECAY), optax.scale(-2.0))
    found = run(chain, jnp.asarray(gradients), jnp.asarray(resets))
    expected = -2 * written_out(gradients.clip(-0.5, 0.5), np.full(STEPS, DECAY), resets)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_linear_td_equals_the_lambda_return():
    """With weights held, the sum of delta_t z_t is that of (G_t - v_t) times the gradient: eq. 12.2 and 12.3."""
    gamma, lam, features, w = 0.9, 0.7, numbers(6, STEPS, 4), numbers(7, 4)
    rewards, last = numbers(8, STEPS), [3, STEPS - 1]  # two episodes
    values = features @ w
    expected, returns = np.zeros(4), 0.0
    for t in reversed(range(STEPS)):
        after = 0.0 if t in last else gamma * ((1 - lam) * values[t + 1] + lam * returns)
        returns = rewards[t] + after
        expected += (returns - values[t]) * features[t]
    resets = np.array([t - 1 in last for t in range(STEPS)])
    traces = run(eligibility_trace(gamma * lam), jnp.asarray(features), jnp.asarray(resets))
    nexts = np.array([0.0 if t in last else values[t + 1] for t in range(STEPS)])
    np.testing.assert_allclose((rewards + gamma * nexts - values) @ np.asarray(traces), expected, rtol=1e-12)


def test_tabular_td_on_a_random_walk():
    """Online updates of a table of five states; the other table has its trace and its episodes by hand."""
    gamma, lam, alpha = 0.95, 0.8, 0.3
    random, table, z = np.random.default_rng(9), np.zeros(5), np.zeros(5)
    transform, learnt = eligibility_trace(gamma * lam), jnp.zeros(5)
    state, value_of = transform.init(learnt), jax.grad(lambda table, s: table[s])
    for _ in range(20):
        s, first = 2, True
        z[:] = 0
        while 0 <= s < 5:
            after = s + random.choice([-1, 1])
            inside = 0 <= after < 5
            z *= gamma * lam
            z[s] += 1
            table = table + alpha * (float(after == 5) + (gamma * table[after] if inside else 0) - table[s]) * z
            trace, state = transform.update(value_of(learnt, s), state, reset=first)
            delta = float(after == 5) + (gamma * learnt[after] if inside else 0) - learnt[s]
            learnt = learnt + alpha * delta * trace
            s, first = after, False
    np.testing.assert_allclose(learnt, table, rtol=1e-12)
    assert (np.diff(table) > 0).all()


def test_two_signals_of_one_learner():
    """Each output has its own trace: two cotangents of a step by ``vmap``, against ``jax.grad`` of a weighted sum."""
    learner = deep_eprop(stack(*(indrnn(n, activation=jnp.tanh, param_dtype=float) for n in (3, 2))), exact=True)
    xs = jax.random.normal(jax.random.key(0), (STEPS, 1, 2))
    params, carry = learner.network.init(jax.random.key(1), xs[0])
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    transform = eligibility_trace(DECAY)
    signals = jnp.eye(2)[:, None]

    def step(now, x):
        state, trace = now
        state, _ = learner.step(params, state, x)
        gradients = jax.vmap(lambda dy: learner.gradient(params, state, dy))(signals)
        z, trace = transform.update(gradients, trace)
        return (state, trace), z

    start = learner.init(params, carry, xs[0]), transform.init(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params))
    found = jax.tree.map(lambda leaf: leaf[-1], jax.jit(lambda: jax.lax.scan(step, start, xs)[1])())

    def expected(params):
        """Both sums at once."""
        apply = jax.vmap(learner.network.apply, (None, 0, 0))
        ys = jax.lax.scan(lambda carry, x: apply(params, carry, x), carry, xs)[1]
        return jnp.asarray(DECAY ** np.arange(STEPS)[::-1]) @ ys[:, 0]

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(jax.jacrev(expected))(params)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="from 0 to 1; seen"):
        eligibility_trace(decay)


@pytest.mark.parametrize("decay", ["0.9", 0.9j, True, np.ones(2)])
def test_a_decay_that_is_no_number_is_refused(decay):
    with pytest.raises(TypeError, match="a real number"):
        eligibility_trace(decay)


def test_what_does_not_fit_is_refused():
    transform = eligibility_trace(DECAY)
    state = transform.init({"w": jnp.zeros((BATCH, 2))})
    with pytest.raises(ValueError, match=r"'w': reset has one boolean for each of 4 examples.*batch of 4; seen"):
        transform.update({"w": jnp.ones((BATCH, 2))}, state, reset=jnp.zeros(4, bool))
    with pytest.raises(ValueError, match="'w': seen the shape"):
        transform.update({"w": jnp.ones(2)}, state)
    with pytest.raises(ValueError, match="structure"):
        transform.update([jnp.ones((BATCH, 2))], state)
    with pytest.raises(ValueError, match="is complex"):
        transform.update({"w": jnp.ones((BATCH, 2), complex)}, state)
    with pytest.raises(ValueError, match="integers or keys"):
        transform.update(jnp.ones(2), transform.init(jnp.arange(2)))
    with pytest.raises(TypeError, match="booleans"):
        transform.update({"w": jnp.ones((BATCH, 2))}, state, reset=jnp.zeros(BATCH))
    with pytest.raises(ValueError, match="one boolean, or one per example"):
        transform.update({"w": jnp.ones((BATCH, 2))}, state, reset=jnp.zeros((BATCH, 1), bool))
