"""The element-wise LSTM and recurrent trace units against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.cells import elstm, rtu
from tests.cells.test_cells import EXACT, INPUTS, KEY, XS, run, sigmoid, start


def test_elstm_equation():
    cell = elstm(5, param_dtype=jnp.float64)
    p, c = start(cell)
    carries, ys = run(cell, p, c, XS)
    c = np.asarray(c)
    for x, carry, y in zip(np.asarray(XS), carries, ys, strict=True):
        f = sigmoid(x @ p["forget_kernel"] + p["forget_weight"] * c + p["forget_bias"])
        z = np.tanh(x @ p["update_kernel"] + p["update_weight"] * c + p["update_bias"])
        c = f * c + (1 - f) * z
        np.testing.assert_allclose(carry, c, **EXACT)
        o = sigmoid(x @ p["output_kernel"] + c @ p["output_recurrent_kernel"] + p["output_bias"])
        np.testing.assert_allclose(y, o * c, **EXACT)


def test_elstm_starts_as_documented():
    p = jax.device_get(elstm(2000, param_dtype=jnp.float64).init(KEY, XS[0])[0])
    for name in ("forget_weight", "update_weight"):
        np.testing.assert_allclose(p[name].std(), 0.1, rtol=0.05)
    for name in ("forget_kernel", "update_kernel"):
        np.testing.assert_allclose(p[name].std(), INPUTS**-0.5, rtol=0.05)
    # One matrix of inputs + features rows.
    for name in ("output_kernel", "output_recurrent_kernel"):
        np.testing.assert_allclose(p[name].std(), (INPUTS + 2000) ** -0.5, rtol=0.05)
    assert not any(p[f"{gate}_bias"].any() for gate in ("forget", "update", "output"))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_rtu_equation(activation, linear):
    """As the complex recurrence that its two parts stand for."""
    cell = rtu(5, linear=linear, activation=activation, param_dtype=jnp.float64)
    p, carry = start(cell)
    carries, ys = run(cell, p, carry, XS)
    squash = np.tanh if activation is jnp.tanh else lambda a: np.maximum(a, 0)
    eigenvalue = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    gamma = np.sqrt(1 - np.abs(eigenvalue) ** 2)
    kernel = p["input_kernel_1"] + 1j * p["input_kernel_2"]
    h = np.zeros((3, 5), complex)
    for t, x in enumerate(np.asarray(XS)):
        h = eigenvalue * h + gamma * (x @ kernel)
        after = squash(h.real) + 1j * squash(h.imag)
        h = h if linear else after
        np.testing.assert_allclose(carries[0][t] + 1j * carries[1][t], h, **EXACT)
        np.testing.assert_allclose(ys[t], np.concatenate([after.real, after.imag], axis=-1), **EXACT)
    assert ys.shape == (*XS.shape[:2], 10)


def test_rtu_starts_on_its_ring():
    p = jax.device_get(rtu(2000, r_min=0.4, r_max=0.9, max_phase=1.5, param_dtype=jnp.float64).init(KEY, XS[0])[0])
    radius, phase = np.exp(-np.exp(p["nu_log"])), np.exp(p["theta_log"])
    assert 0.4 <= radius.min() < 0.41
    assert 0.89 < radius.max() <= 0.9
    assert 1.49 < phase.max() <= 1.5
    assert abs(np.mean(radius**2 > (0.4**2 + 0.9**2) / 2) - 0.5) < 0.05
    for name in ("input_kernel_1", "input_kernel_2"):
        np.testing.assert_allclose(p[name].std(), INPUTS**-0.5, rtol=0.05)
    assert not np.array_equal(p["input_kernel_1"], p["input_kernel_2"])


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("r_max", [1.0, 0.1])
def test_rtu_gradients_are_finite_in_float32(r_max):
    """γ = (1 - r²)^½ has an infinite slope at r = 1, where no unit starts."""
    cell = rtu(5000, r_max=r_max)
    params, carry = cell.init(KEY, XS[0])
    x = XS[0].astype(jnp.float32)
    params, carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, carry))

    def total(params):
        carry_t, y = jax.vmap(cell.apply, in_axes=(None, 0, 0))(params, carry, x)
        return sum(leaf.sum() for leaf in jax.tree.leaves((carry_t, y)))

    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.grad(total)(params)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: elstm(0), "features.*seen 0"),
        (lambda: elstm(3).init(KEY, XS), r"elstm.*\(batch, inputs\)"),
        (lambda: rtu(2.0), "features.*seen 2.0"),
        (lambda: rtu(3, r_min=0.9, r_max=0.5), "r_min < r_max"),
        (lambda: rtu(3, max_phase=0.0), "max_phase"),
        (lambda: rtu(3).init(KEY, XS), r"rtu.*\(batch, inputs\)"),
    ],
)
def test_bad_arguments(make, named):
    with pytest.raises(ValueError, match=named):
        make()
