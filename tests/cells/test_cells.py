"""The library's own cells against their equations in NumPy; the zoo's pairs against its cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.cells import alif, indrnn, leaky_readout, leaky_rnn, lif, lru, triangular_spike
from tests import zoo
from tests.zoo_cells import stock

STEPS, BATCH, INPUTS = 12, 3, 2
KEY = jax.random.key(0)
XS = jax.random.normal(jax.random.key(1), (STEPS, BATCH, INPUTS))
# float64 on both sides: rounding only.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SPIKING = {"lif": lif, "alif": alif}


def run(cell, params, carry, xs):
    step = jax.vmap(cell.apply, in_axes=(None, 0, 0))

    def keep_both(h, x):
        h, y = step(params, h, x)
        return h, (h, y)

    return jax.device_get(jax.lax.scan(keep_both, carry, xs)[1])


def start(cell, seed=0):
    """Parameters with random biases in float64, as NumPy arrays, and the carry."""
    params, carry = cell.init(jax.random.key(seed), XS[0])
    rng = np.random.default_rng(seed)
    fill = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    fill = {name: leaf if leaf.any() else rng.normal(size=leaf.shape) for name, leaf in fill.items()}
    return fill, carry


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def test_leaky_rnn_equation():
    cell = leaky_rnn(5, param_dtype=jnp.float64)
    p, h = start(cell)
    carries, ys = run(cell, p, h, XS)
    np.testing.assert_array_equal(carries, ys)
    h, a = np.asarray(h), sigmoid(p["leak"])
    for x, y in zip(np.asarray(XS), ys, strict=True):
        h = (1 - a) * h + a * np.tanh(x @ p["input_kernel"] + h @ p["recurrent_kernel"] + p["bias"])
        np.testing.assert_allclose(y, h, **EXACT)


def test_leaky_rnn_time_constants_in_steps():
    cell = leaky_rnn(500, time_constants=(2.0, 50.0), param_dtype=jnp.float64)
    params, _ = cell.init(KEY, XS[0])
    tau = -1 / np.log(1 - sigmoid(np.asarray(params["leak"])))
    assert 2 <= tau.min() < 2.2
    assert 45 < tau.max() <= 50
    # Log-uniform: the median is the geometric mean of the ends.
    assert abs(np.median(tau) - 10) < 1.5
    silent = {**params, "recurrent_kernel": jnp.zeros((500, 500))}
    carries, _ = run(cell, silent, jnp.ones((BATCH, 500)), jnp.zeros((7, BATCH, INPUTS)))
    np.testing.assert_allclose(carries[-1][0], np.exp(-7 / tau), rtol=1e-9)


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_indrnn_equation(activation):
    cell = indrnn(5, activation=activation, param_dtype=jnp.float64)
    p, h = start(cell)
    _, ys = run(cell, p, h, XS)
    h = np.asarray(h)
    squash = np.tanh if activation is jnp.tanh else lambda a: np.maximum(a, 0)
    for x, y in zip(np.asarray(XS), ys, strict=True):
        h = squash(x @ p["input_kernel"] + p["recurrent_weight"] * h + p["bias"])
        np.testing.assert_allclose(y, h, **EXACT)


@pytest.mark.mixed_promotion
def test_indrnn_recurrent_weights_start_in_their_range():
    params, _ = indrnn(500, recurrent_max=0.5).init(KEY, XS[0])
    u = np.asarray(params["recurrent_weight"])
    assert 0 <= u.min() < 0.02
    assert 0.48 < u.max() <= 0.5


def test_lru_equation():
    cell = lru(2, 5, param_dtype=jnp.float64)
    p, h = start(cell)
    assert all(np.isrealobj(leaf) for leaf in p.values())
    assert h.dtype == jnp.complex128
    carries, ys = run(cell, p, h, XS)
    eigenvalue = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    b, c = p["B_re"] + 1j * p["B_im"], p["C_re"] + 1j * p["C_im"]
    h = np.asarray(h)
    for x, carry, y in zip(np.asarray(XS), carries, ys, strict=True):
        h = eigenvalue * h + np.exp(p["gamma_log"]) * (x @ b.T)
        np.testing.assert_allclose(carry, h, **EXACT)
        np.testing.assert_allclose(y, (h @ c.T).real + x @ p["D"].T, **EXACT)


def test_lru_starts_on_its_ring():
    cell = lru(3, 2000, r_min=0.4, r_max=0.9, max_phase=1.5, param_dtype=jnp.float64)
    p = jax.device_get(cell.init(KEY, XS[0])[0])
    radius, phase = np.exp(-np.exp(p["nu_log"])), np.exp(p["theta_log"])
    assert 0.4 <= radius.min() < 0.41
    assert 0.89 < radius.max() <= 0.9
    assert 0 < phase.min() < 0.01
    assert 1.49 < phase.max() <= 1.5
    # Uniform by area: half of the eigenvalues lie beyond the radius that halves the ring's area.
    assert abs(np.mean(radius**2 > (0.4**2 + 0.9**2) / 2) - 0.5) < 0.05
    np.testing.assert_allclose(np.exp(p["gamma_log"]), np.sqrt(1 - radius**2), rtol=1e-9)
    # 2000 · 2 and 3 · 2000 samples: the standard deviations are known to about 1 %.
    np.testing.assert_allclose([p["B_re"].std(), p["B_im"].std()], (2 * INPUTS) ** -0.5, rtol=0.05)
    np.testing.assert_allclose([p["C_re"].std(), p["C_im"].std()], 2000**-0.5, rtol=0.05)


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("r_max", [1.0, 0.1])
def test_lru_parameters_are_finite_in_float32(r_max):
    params, _ = lru(3, 5000, r_max=r_max).init(KEY, XS[0])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in params.values())


def spiking_reference(p, carry, xs, *, adaptive, tau, dt, threshold, period, tau_adaptation=1.0, beta=0.0):
    """The equations of lif and alif, unit by unit."""
    v, z = np.array(carry[0]), np.array(carry[2 if adaptive else 1])
    a = np.array(carry[1]) if adaptive else np.zeros_like(v)
    left = np.array(carry[-1]) if period else np.zeros(v.shape, int)
    lateral = p.get("recurrent_kernel")
    out = []
    for x in np.asarray(xs):
        a_t, v_t, z_t = np.zeros_like(v), np.zeros_like(v), np.zeros_like(v)
        for example, unit in np.ndindex(*v.shape):
            total = np.exp(-dt / tau) * v[example, unit] + x[example] @ p["input_kernel"][:, unit]
            total -= threshold * z[example, unit]
            if lateral is not None:
                total += sum(z[example, j] * lateral[j, unit] for j in range(v.shape[1]) if j != unit)
            a_t[example, unit] = np.exp(-dt / tau_adaptation) * a[example, unit] + z[example, unit]
            v_t[example, unit] = total
            resting = left[example, unit] > 1
            z_t[example, unit] = float(not resting and total > threshold + beta * a_t[example, unit])
            left[example, unit] = period + 1 if z_t[example, unit] else max(left[example, unit] - 1, 0)
        v, a, z = v_t, a_t, z_t
        out.append((v, a, z, left.copy()))
    return out


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("refractory", [0.0, 1.0])
@pytest.mark.parametrize("name", SPIKING)
def test_spiking_equations(name, recurrent, refractory):
    options = {"tau": 4.0, "dt": 0.5, "threshold": 0.6}
    adaptation = {"tau_adaptation": 10.0, "beta": 0.2} if name == "alif" else {}
    constructor = SPIKING[name]
    cell = constructor(5, recurrent=recurrent, refractory=refractory, **options, **adaptation, param_dtype=jnp.float64)
    p, carry = start(cell)
    assert ("recurrent_kernel" in p) == recurrent
    carries, ys = run(cell, p, carry, XS)
    wanted = spiking_reference(
        p, carry, XS, adaptive=name == "alif", period=round(refractory / 0.5), **options, **adaptation
    )
    for t, (v, a, z, left) in enumerate(wanted):
        leaves = [v, a, z] if name == "alif" else [v, z]
        leaves += [left] if refractory else []
        assert len(carries) == len(leaves)
        for seen, leaf in zip(carries, leaves, strict=True):
            np.testing.assert_allclose(seen[t], leaf, **EXACT)
        np.testing.assert_array_equal(ys[t], z)
    assert 0.05 < np.mean(ys) < 0.9


def test_refractory_period_counts_whole_steps():
    """Driven far above threshold, a unit fires once in (period + 1) steps; 3 · 0.1 ms is three steps of 0.1 ms."""
    cell = lif(1, recurrent=False, dt=0.1, refractory=3 * 0.1, param_dtype=jnp.float64)
    _, carry = cell.init(KEY, XS[0])
    _, ys = run(cell, {"input_kernel": jnp.full((INPUTS, 1), 9.0)}, carry, jnp.ones((9, BATCH, INPUTS)))
    np.testing.assert_array_equal(ys[:, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0, 1])


def test_no_surrogate_derivative_while_refractory():
    cell = lif(1, recurrent=False, refractory=2.0, param_dtype=jnp.float64)
    params = {"input_kernel": jnp.ones((INPUTS, 1))}

    def spike(x, left):
        carry = (jnp.zeros(1), jnp.zeros(1), jnp.array([left], jnp.int32))
        return cell.apply(params, carry, x)[1][0]

    for left in (0, 1):
        slope = jax.grad(spike)(jnp.array([0.4, 0.4]), left)
        np.testing.assert_allclose(slope, 0.3 * (1 - 0.2), rtol=1e-12)
    np.testing.assert_array_equal(jax.grad(spike)(jnp.array([0.4, 0.4]), 2), 0)


def test_membrane_and_readout_decay_in_milliseconds():
    """No input: v and y halve in τ ln 2 ms, in however many steps."""
    for steps in (1, 4):
        tau, dt = 20.0, 20.0 * np.log(2) / steps
        silent = jnp.zeros((steps, BATCH, INPUTS))
        membrane = lif(1, recurrent=False, tau=tau, dt=dt, param_dtype=jnp.float64)
        params, (_, z) = membrane.init(KEY, XS[0])
        (v, _), _ = run(membrane, params, (jnp.full_like(z, 0.8), z), silent)
        np.testing.assert_allclose(v[-1], 0.4, rtol=1e-12)
        smooth = leaky_readout(1, tau=tau, dt=dt, param_dtype=jnp.float64)
        params, y = smooth.init(KEY, XS[0])
        _, ys = run(smooth, params, y + 0.8, silent)
        np.testing.assert_allclose(ys[-1], 0.4, rtol=1e-12)


def test_leaky_readout_equation():
    cell = leaky_readout(2, tau=5.0, dt=2.0, param_dtype=jnp.float64)
    p, y = start(cell)
    _, ys = run(cell, p, y, XS)
    y = np.asarray(y)
    for x, seen in zip(np.asarray(XS), ys, strict=True):
        y = np.exp(-2 / 5) * y + x @ p["kernel"] + p["bias"]
        np.testing.assert_allclose(seen, y, **EXACT)


def test_surrogate_derivative_in_both_modes():
    distance = jnp.array([-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0])
    wanted = np.array([0.0, 0.0, 0.75, 1.0, 0.5, 0.0, 0.0])
    np.testing.assert_array_equal(triangular_spike(distance), [0, 0, 0, 0, 1, 1, 1])
    for dampening in (0.3, 1.0):
        spike = lambda d, dampening=dampening: triangular_spike(d, dampening)  # noqa: E731
        np.testing.assert_allclose(jax.vmap(jax.grad(spike))(distance), dampening * wanted, rtol=1e-12)
        _, tangent = jax.jvp(spike, (distance,), (jnp.full_like(distance, 2.0),))
        np.testing.assert_allclose(tangent, 2 * dampening * wanted, rtol=1e-12)


def test_surrogate_is_scaled_by_the_base_threshold():
    """ψ = (γ / v_th) max(0, 1 - |v - v_th| / v_th), the pseudo-derivative of the paper."""
    cell = lif(1, recurrent=False, threshold=2.0, dampening=0.5, param_dtype=jnp.float64)
    slope = jax.grad(lambda x: cell.apply({"input_kernel": jnp.ones((1, 1))}, (jnp.zeros(1), jnp.zeros(1)), x)[1][0])
    np.testing.assert_allclose(slope(jnp.array([1.5])), 0.5 / 2 * (1 - 0.5 / 2), rtol=1e-12)


@pytest.mark.parametrize("name", SPIKING)
def test_gradient_of_the_reset(name):
    """dv_t/dz_{t-1} is -threshold through the reset, and 0 where the reset is detached; the values are the same."""
    for detach, slope in ((False, -0.7), (True, 0.0)):
        cell = SPIKING[name](1, recurrent=False, threshold=0.7, detach_reset=detach, param_dtype=jnp.float64)
        params, carry = cell.init(KEY, XS[0])
        rest = [leaf[0] for leaf in carry[:-1]]

        def potential(z, cell=cell, params=params, rest=rest):
            return cell.apply(params, (*rest, z), jnp.zeros(INPUTS))[0][0][0]

        np.testing.assert_allclose(jax.grad(potential)(jnp.ones(1)), slope, rtol=1e-12)
        np.testing.assert_allclose(potential(jnp.ones(1)), -0.7, rtol=1e-12)


@pytest.mark.parametrize("cell", [cell for cell in stock() if cell.elementwise], ids=lambda cell: cell.name)
def test_elementwise_cells_are_elementwise_in_their_carry(cell):
    problem = zoo.problem(cell.name, steps=1)
    carry, x = jax.tree.map(lambda leaf: leaf[0], (problem.carry, problem.xs[0]))
    free = [leaf for leaf in jax.tree.leaves(carry) if zoo.is_differentiable(leaf)]

    def new_carry(values):
        values = [
            jax.lax.complex(z.real, z.imag) if jnp.iscomplexobj(like) else z
            for z, like in zip(values, free, strict=True)
        ]
        return problem.network.apply(problem.params, jax.tree.unflatten(jax.tree.structure(carry), values), x)[0]

    holomorphic = any(jnp.iscomplexobj(leaf) for leaf in free)
    jacobian = jax.jacrev(new_carry, holomorphic=holomorphic)(free) if free else ()
    blocks = [leaf for leaf in jax.tree.leaves(jacobian) if leaf.ndim == 2]
    assert len(blocks) == len(free) ** 2
    for block in blocks:
        np.testing.assert_array_equal(block - np.diag(np.diagonal(block)), 0)


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("cell", stock(), ids=lambda cell: cell.name)
def test_pair_of_every_stock_cell_composes_to_apply(cell):
    problem = zoo.problem(cell.name, steps=1)
    carry, x = problem.carry, problem.xs[0]
    seen = jax.vmap(cell.pair.apply, in_axes=(None, 0, 0))(problem.params, carry, x)
    wanted = jax.vmap(problem.network.apply, in_axes=(None, 0, 0))(problem.params, carry, x)
    assert jax.tree.structure(seen) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), seen, wanted)


@pytest.mark.parametrize("name", [name for name, cell in zoo.cells().items() if cell.twin])
def test_twin_localised_by_hand_has_the_values_of_its_cell(name):
    problem = zoo.problem(name, steps=1)
    carry, x = problem.carry, problem.xs[0]
    seen = jax.vmap(zoo.cells()[name].twin, in_axes=(None, 0, 0))(problem.params, carry, x)
    wanted = jax.vmap(problem.network.apply, in_axes=(None, 0, 0))(problem.params, carry, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), seen, wanted)


@pytest.mark.parametrize("name", ["lif", "lif_zero_reset", "alif_refractory", "custom_vjp_spike", "stack_3_spiking"])
def test_spiking_problems_spike_and_keep_their_margin(name):
    problem = zoo.problem(name)
    graph_spikes = [
        np.asarray(leaf)
        for leaf in jax.tree.leaves(run(problem.network, problem.params, problem.carry, problem.xs)[0])
        if set(np.unique(leaf)) <= {0.0, 1.0} and zoo.is_differentiable(leaf)
    ]
    assert graph_spikes
    assert all(0.02 < spikes.mean() < 0.9 for spikes in graph_spikes)
    # What float32 comparisons need.
    assert 1e-4 < zoo.margin(problem) < 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: leaky_rnn(0), "features.*>= 1.*seen 0"),
        (lambda: leaky_rnn(True), "features.*seen True"),
        (lambda: leaky_rnn(3, time_constants=(5.0, 2.0)), "smallest, largest"),
        (lambda: leaky_rnn(3, time_constants=(0.0, 2.0)), "above 0"),
        (lambda: indrnn(3, recurrent_max=0.0), "recurrent_max must be above 0"),
        (lambda: lru(3, 2.0), "state_size.*seen 2.0"),
        (lambda: lru(3, 2, r_min=0.9, r_max=0.5), "r_min < r_max"),
        (lambda: lru(3, 2, max_phase=7.0), "max_phase"),
        (lambda: lif(3, tau=0.0), "tau must be above 0"),
        (lambda: lif(3, refractory=-1.0), "refractory.*seen -1.0"),
        (lambda: alif(3, beta=-0.1), "beta.*seen -0.1"),
        (lambda: alif(3, tau_adaptation=-1.0), "tau_adaptation must be above 0"),
        (lambda: leaky_readout(2, dt=0.0), "dt must be above 0"),
        (lambda: lif(3).init(KEY, jnp.zeros((5, 3, 2))), r"lif.*\(batch, inputs\).*\(5, 3, 2\)"),
    ],
)
def test_bad_arguments(make, named):
    with pytest.raises(ValueError, match=named):
        make()
