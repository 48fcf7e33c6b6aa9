"""Resets, weighted currents and surrogates of lif and alif: equations, gradients of the reset, no trace for a spike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import analyse
from deepeprop_jax.cells import ArcTan, Exponential, Sigmoid, StraightThrough, SuperSpike, leaky_readout, lif
from tests.cells.test_cells import BATCH, EXACT, INPUTS, KEY, SPIKING, XS, run, start

RESETS = ("subtract", "zero", "none")


def membrane(p, v, z, x, *, alpha, threshold, reset, low_pass):
    """The new potential, example by example and unit by unit."""
    new = np.zeros_like(v)
    for example, unit in np.ndindex(*v.shape):
        current = x[example] @ p["input_kernel"][:, unit]
        if "recurrent_kernel" in p:
            current += sum(z[example, j] * p["recurrent_kernel"][j, unit] for j in range(v.shape[1]) if j != unit)
        before = 0.0 if reset == "zero" and z[example, unit] else v[example, unit]
        new[example, unit] = alpha * before + (1 - alpha if low_pass else 1) * current
        new[example, unit] -= threshold * z[example, unit] if reset == "subtract" else 0
    return new


@pytest.mark.parametrize("low_pass", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", SPIKING)
def test_equations(name, reset, low_pass):
    alpha, threshold, beta = np.exp(-0.5 / 4), 0.12 if low_pass else 0.6, 0.02
    options = {"tau_adaptation": 10.0, "beta": beta} if name == "alif" else {}
    cell = SPIKING[name](
        5, tau=4.0, dt=0.5, threshold=threshold, reset=reset, low_pass=low_pass, param_dtype=jnp.float64, **options
    )
    p, carry = start(cell)
    carries, ys = run(cell, p, carry, XS)
    v, z, a = (np.zeros((BATCH, 5)) for _ in range(3))
    for t, x in enumerate(np.asarray(XS)):
        a = np.exp(-0.5 / 10) * a + z
        v = membrane(p, v, z, x, alpha=alpha, threshold=threshold, reset=reset, low_pass=low_pass)
        z = (v > threshold + (beta * a if name == "alif" else 0)).astype(float)
        np.testing.assert_allclose(carries[0][t], v, **EXACT)
        np.testing.assert_array_equal(carries[-1][t], z)
        np.testing.assert_array_equal(ys[t], z)
    assert 0.05 < np.mean(ys) < 0.9


@pytest.mark.parametrize("name", SPIKING)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("reset", "value", "by_z", "by_v"), [
    # α v - threshold z, α v (1 - z) and α v, at α = 1/2, v = 0.8, z = 1, threshold 0.7
    ("subtract", 0.4 - 0.7, -0.7, 0.5),
    ("zero", 0.0, -0.4, 0.0),
    ("none", 0.4, 0.0, 0.5),
])  # fmt: skip
def test_gradient_of_every_reset(name, detach, reset, value, by_z, by_v):
    cell = SPIKING[name](
        1,
        recurrent=False,
        tau=1 / np.log(2),
        threshold=0.7,
        reset=reset,
        detach_reset=detach,
        low_pass=True,
        param_dtype=jnp.float64,
    )
    params, carry = cell.init(KEY, XS[0])
    between = [leaf[0] for leaf in carry[1:-1]]

    def potential(v, z):
        return cell.apply(params, (v, *between, z), jnp.zeros(INPUTS))[0][0][0]

    at = (jnp.full(1, 0.8), jnp.ones(1))
    np.testing.assert_allclose(potential(*at), value, **EXACT)
    slopes = np.ravel(jax.grad(potential, argnums=(0, 1))(*at))
    np.testing.assert_allclose(slopes, [by_v, 0.0 if detach else by_z], **EXACT)


def test_low_pass_ends_at_the_size_of_a_constant_input():
    """Whatever the time constant is; without it the potential is 1 / (1 - α) times as large."""
    x = jnp.ones((4000, BATCH, INPUTS))
    for tau, low_pass in ((5.0, True), (50.0, True), (5.0, False)):
        expected = 0.6 * (1 if low_pass else 1 / (1 - np.exp(-1 / tau)))
        cell = lif(1, tau=tau, recurrent=False, threshold=1e6, low_pass=low_pass, param_dtype=jnp.float64)
        _, carry = cell.init(KEY, x[0])
        (v, _), _ = run(cell, {"input_kernel": jnp.full((INPUTS, 1), 0.3)}, carry, x)
        np.testing.assert_allclose(v[-1], expected, rtol=1e-9)
        readout = leaky_readout(1, tau=tau, low_pass=low_pass, param_dtype=jnp.float64)
        params = {"kernel": jnp.full((INPUTS, 1), 0.25), "bias": jnp.full(1, 0.1)}
        _, ys = run(readout, params, readout.init(KEY, x[0])[1], x)
        np.testing.assert_allclose(ys[-1], expected, rtol=1e-9)


@pytest.mark.parametrize(("use_bias", "low_pass"), [(False, False), (False, True), (True, True)])
def test_readout_equation(use_bias, low_pass):
    cell = leaky_readout(2, tau=5.0, use_bias=use_bias, low_pass=low_pass, param_dtype=jnp.float64)
    p, y = start(cell)
    assert sorted(p) == (["bias", "kernel"] if use_bias else ["kernel"])
    _, ys = run(cell, p, y, XS)
    kappa, y = np.exp(-1 / 5), np.asarray(y)
    for x, seen in zip(np.asarray(XS), ys, strict=True):
        y = kappa * y + (1 - kappa if low_pass else 1) * (x @ p["kernel"] + p.get("bias", 0))
        np.testing.assert_allclose(seen, y, **EXACT)


SURROGATES = (None, Exponential(), SuperSpike(), ArcTan(), Sigmoid(), StraightThrough(), StraightThrough(sharpness=1.0))
PLAIN = {"reset": "subtract", "refractory": 0.0, "recurrent": True, "detach_reset": False, "low_pass": False}
CASES = [
    *({"surrogate": surrogate, "refractory": 2.0} for surrogate in SURROGATES),
    *({"surrogate": surrogate, "reset": "zero", "recurrent": False} for surrogate in SURROGATES[2::3]),
    *({"reset": reset, "refractory": period} for reset in RESETS[1:] for period in (0.0, 2.0)),
    *({"reset": reset, "detach_reset": True, "low_pass": True, "refractory": 2.0} for reset in RESETS),
]


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("name", ["lif", pytest.param("alif", marks=pytest.mark.slow)])
def test_the_spike_never_has_a_trace(name):
    """It follows from the rest of the carry: with every surrogate and reset, with and without a refractory period."""
    x = jnp.zeros((2, INPUTS))
    for case in CASES:
        options = PLAIN | case
        cell = SPIKING[name](3, **options)
        params, carry = cell.init(KEY, x)
        node = analyse(cell, params, carry, x).nodes[0]
        assert node.derived == (("1",) if name == "lif" else ("2",)), case
        assert node.recurrence == ("localised" if options["recurrent"] else "element-wise"), case
        assert {leaf.rows for leaf in node.leaves} == {node.slots} == {1 if name == "lif" else 2}, case


def regression_experiment():
    """NEST's regression experiment: weights and data of the legacy generator with seed 1, in NEST's order."""
    draw = np.random.RandomState(1)
    kernels = [draw.randn(100, 100).T / 10, draw.randn(100, 100).T / 10, draw.randn(100, 1).T / 10]
    draw.randn(100, 1)  # the feedback weights
    np.fill_diagonal(kernels[1], 0)
    xs = (draw.rand(1000, 100) < 0.05).astype(np.float64)
    xs[0] = 0
    amplitudes, phases = draw.uniform(0.5, 2, 4), draw.uniform(0, 2 * np.pi, 4)
    waves = [
        amplitude * np.sin(np.linspace(phase, phase + 2 * np.pi * (1000 // period), 1000))
        for amplitude, phase, period in zip(amplitudes, phases, (1000, 500, 333, 200), strict=True)
    ]
    target = np.sum(waves, axis=0)
    target -= target[0]
    # From presynaptic unit to postsynaptic unit, as the library has them.
    kernels = [kernel.astype(np.float32).astype(np.float64).T for kernel in kernels]
    return kernels, xs, target / np.abs(target).max()


def test_nests_regression_experiment_has_its_first_loss():
    """The loss that NEST prints before its first update: 1000 steps of 100 units and their readout."""
    (w_in, w_rec, w_out), xs, target = regression_experiment()
    hidden = lif(100, tau=30.0, threshold=0.03, low_pass=True, detach_reset=True, param_dtype=jnp.float64)
    readout = leaky_readout(1, tau=30.0, low_pass=True, use_bias=False, param_dtype=jnp.float64)
    xs = jnp.asarray(xs)[:, None]
    carries = [cell.init(KEY, x)[1] for cell, x in ((hidden, xs[0]), (readout, jnp.zeros((1, 100))))]
    _, z = run(hidden, {"input_kernel": w_in, "recurrent_kernel": w_rec}, carries[0], xs)
    _, y = run(readout, {"kernel": w_out}, carries[1], jnp.asarray(z))
    assert 0.001 < z.mean() < 0.1
    np.testing.assert_allclose(np.sum((y[:, 0, 0] - target) ** 2) / 2, 101.964356999041, rtol=1e-12)


@pytest.mark.parametrize("name", SPIKING)
def test_bad_resets(name):
    for reset in ("hard", None, "Zero"):
        with pytest.raises(ValueError, match=f"one of 'subtract', 'zero', 'none'; seen {reset!r}"):
            SPIKING[name](3, reset=reset)
