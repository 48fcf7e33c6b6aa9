"""The mean of a random rule's gradient is BPTT's: over 10,000 draws, within its own standard error, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import OnlineLearner, stack
from deepeprop_jax.cells import leaky_rnn
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.reference import bptt, truncated_bptt
from deepeprop_jax.rules import kf_rtrl, kronecker_sum, uoro
from deepeprop_jax.rules.kronecker_sum import least_variance
from deepeprop_jax.rules.small_matrices import small_svd, thin_qr

DRAWS, STEPS, BATCH = 10_000, 5, 2
FARTHEST = 4.5
"""Standard errors from the mean: one entry in 150,000 would be farther by chance; there are less than 100."""

RULES: dict[str, Callable[[Cell], OnlineLearner]] = {
    "UORO": uoro,
    "KF-RTRL": kf_rtrl,
    "OK, r = 1": lambda network: kronecker_sum(network, 1),
    "OK, r = 2": lambda network: kronecker_sum(network, 2),
}


def squared(y: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.sum((y - target) ** 2)


def network() -> tuple:
    """Two layers, so that influences cross from the lower one to the upper."""
    made = stack(leaky_rnn(3), leaky_rnn(4))
    draw = np.random.default_rng(0)
    xs, targets = jnp.asarray(draw.normal(size=(STEPS, BATCH, 3))), jnp.asarray(draw.normal(size=(STEPS, BATCH, 4)))
    params, carry = made.init(jax.random.key(0), xs[0].astype(jnp.float32))
    carry = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape)), carry)
    return made, jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params), carry, xs, targets


def draws(learner: OnlineLearner, params: PyTree, carry: PyTree, xs: jax.Array, targets: jax.Array) -> PyTree:
    """Gradients, (draws, ...)."""
    run = learner.value_and_grad(squared)

    def one(key: jax.Array) -> PyTree:
        return run(params, learner.init(params, carry, xs[0], key), xs, targets)[1]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), DRAWS))


def errors(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each entry, the mean's distance from the truth in standard errors; of an entry without noise, 0 if it is right
    to rounding."""
    distance, error = np.abs(found.mean(0) - truth), found.std(0) / np.sqrt(len(found))
    exact = error < 1e-13
    return np.where(exact, np.where(distance < 1e-12, 0, np.inf), distance / np.where(exact, 1, error))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "OK, r = 1" else ()) for name in RULES]
)
def test_the_mean_of_many_draws_is_the_gradient_of_bptt(name: str) -> None:
    made, *problem = network()
    _, truth = jax.jit(bptt(made, squared))(*problem)
    _, biased = jax.jit(truncated_bptt(made, squared, 1))(*problem)
    found = draws(RULES[name](made), *problem)
    far, noisy = [], 0
    for leaf, exact, wrong in zip(*map(jax.tree.leaves, (found, truth, biased)), strict=True):
        leaf, exact, wrong = map(np.asarray, (leaf, exact, wrong))
        z = errors(leaf, exact)
        assert z.max() < FARTHEST, (name, exact.shape, z)
        noisy += bool(leaf.std(0).max() > 1e-6)
        far.append(z[leaf.std(0) > 1e-13])
        if leaf.std(0).max() > 1e-6:
            # The same test tells a gradient without credit in time from BPTT's.
            assert errors(leaf, wrong).max() > FARTHEST, (name, exact.shape)
    assert noisy >= (8 if name == "UORO" else 4)  # all leaves, or all matrices
    # Of normal numbers the mean square is 1; entries of one leaf are no independent ones.
    assert 0.3 < np.mean(np.concatenate(far) ** 2) < 2.5


def test_examples_and_steps_have_signs_of_their_own() -> None:
    made, params, carry, xs, targets = network()
    alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), carry)
    learner = uoro(made)
    state = learner.init(params, alike, xs[0], jax.random.key(2))
    run = jax.jit(learner.value_and_grad(squared))
    (_, after), _ = run(params, state, jnp.broadcast_to(xs[:, :1], xs.shape), targets)
    s, _ = after.traces["uoro"].numbers
    assert not np.allclose(s[0], s[1])
    # A reset forgets s and theta_bar, and goes on with its draws.
    again = learner.reset(after, jnp.ones(BATCH, bool))
    assert not np.any(again.traces["uoro"].numbers[0])
    assert (jax.random.key_data(again.traces["uoro"].keys) == jax.random.key_data(after.traces["uoro"].keys)).all()
    assert not (jax.random.key_data(after.traces["uoro"].keys) == jax.random.key_data(state.traces["uoro"].keys)).any()


@pytest.mark.parametrize("shape", [(7, 3), (2, 3), (3, 3), (40, 6)])
def test_matrices_of_any_rank_are_taken_apart(shape: tuple[int, int]) -> None:
    """Also such with equal columns, columns of zeros, and numbers of very different size."""
    draw, columns = np.random.default_rng(0), shape[1]
    full = draw.normal(size=shape)
    cases = [full, full * 10.0 ** -np.arange(0, 12 * columns, 12), np.zeros(shape), full[:, :1] * np.ones(columns)]
    cases.append(full * (np.arange(columns) != 1))
    for matrix in cases:
        Q, R = map(np.asarray, jax.jit(thin_qr)(jnp.asarray(matrix)))
        np.testing.assert_allclose(Q @ R, matrix, atol=1e-13)
        square = R @ R.T
        L, d, right = map(np.asarray, jax.jit(small_svd)(jnp.asarray(square)))
        np.testing.assert_allclose(L * d @ right.T, square, atol=1e-13 * max(1, np.abs(square).max()))
        np.testing.assert_allclose(right.T @ right, np.eye(columns), atol=1e-13)
        np.testing.assert_allclose(d, np.linalg.svd(square, compute_uv=False), atol=1e-12 * max(1, d[0]))
        if shape[0] >= columns:
            np.testing.assert_allclose(Q.T @ Q, np.eye(columns), atol=1e-13)


@pytest.mark.parametrize("d", [(3.0, 2.0, 1.0), (5.0, 1.0, 0.5, 0.1, 0.01), (3.0, 1.0, 0.0), (0.0, 0.0), (1.0,) * 4])
def test_least_variance_is_least(d: tuple[float, ...]) -> None:
    """The diagonal is right at every draw, and what is off it has the least sum of squares: found by trying every m."""
    numbers, r = np.array(d), len(d) - 1
    X = np.asarray(jax.vmap(lambda key: least_variance(jnp.array(d), key))(jax.random.split(jax.random.key(0), 2000)))
    products = X @ X.transpose(0, 2, 1)
    assert X.shape[1:] == (r + 1, r)
    np.testing.assert_allclose(
        products[:, range(r + 1), range(r + 1)], np.broadcast_to(numbers, (2000, r + 1)), atol=1e-12
    )
    rest = [(m, numbers[m:]) for m in range(r)]
    # With k columns for what is mixed, a variance of s² / k − Σ d² can be had where no d exceeds s / k.
    possible = [
        tail.sum() ** 2 / (r - m) - (tail**2).sum() for m, tail in rest if tail[0] * (r - m) <= tail.sum() + 1e-15
    ]
    spread = ((products - np.diag(numbers)) ** 2).sum((1, 2))
    np.testing.assert_allclose(spread, min(possible), atol=1e-12)
    off = products.mean(0) - np.diag(numbers)
    assert np.abs(off).max() < FARTHEST * products.std(0).max() / np.sqrt(2000) + 1e-12
