"""Rate and voltage regularisation against their formulas, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.cells import low_pass
from deepeprop_jax.losses import rate_regularisation, voltage_regularisation
from tests.cells.test_cells import EXACT, run

VALUES = np.random.default_rng(0).normal(size=(3, 5))


def test_formulas():
    rate = sum(0.5 * (VALUES[:, j].sum() / 3 - 0.2) ** 2 for j in range(5))
    np.testing.assert_allclose(rate_regularisation(jnp.asarray(VALUES), 0.2), rate, **EXACT)
    outside = sum(0.5 * (max(0, v - 0.7) ** 2 + max(0, -v - 0.7) ** 2) for v in VALUES.ravel()) / 3
    np.testing.assert_allclose(voltage_regularisation(jnp.asarray(VALUES), 0.7), outside, **EXACT)
    per_unit = jnp.asarray([0.1, 0.2, 0.3, 0.4, 0.5])
    slope = jax.grad(rate_regularisation)(jnp.asarray(VALUES), per_unit)
    np.testing.assert_allclose(slope, np.tile((VALUES.mean(0) - per_unit) / 3, (3, 1)), **EXACT)


def test_spikes_may_be_integers():
    assert rate_regularisation(jnp.array([[0, 1], [1, 0]]), 0.25) == 0.0625


def test_what_is_no_batch_of_units_is_refused():
    for loss in (rate_regularisation, voltage_regularisation):
        with pytest.raises(ValueError, match=r"shape \(batch, units\); seen \(5,\)"):
            loss(jnp.ones(5), 0.1)


def test_low_pass_equation():
    cell = low_pass(tau=4.0, dt=0.5)
    xs = np.random.default_rng(1).normal(size=(7, 3, 5))
    params, carry = cell.init(jax.random.key(0), jnp.asarray(xs[0]))
    _, ys = run(cell, params, carry, jnp.asarray(xs))
    kappa, y = np.exp(-0.5 / 4), np.zeros((3, 5))
    for t in range(7):
        y = kappa * y + (1 - kappa) * xs[t]
        np.testing.assert_allclose(ys[t], y, **EXACT)
    with pytest.raises(ValueError, match="tau must be above 0"):
        low_pass(tau=0.0)
