"""Surrogate derivatives: numbers by hand, both modes, NEST's formulas, and what they are as objects."""

import copy
import dataclasses
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.cells import (
    ArcTan,
    Exponential,
    Sigmoid,
    StraightThrough,
    SuperSpike,
    Triangular,
    alif,
    lif,
    spike,
    triangular_spike,
)

DISTANCES = [-2.0, -0.5, 0.0, 0.25, 1.0]
# The formula of each paper, evaluated apart from the library: fractions by hand, other digits by Python's math.
REFERENCE = [
    (Triangular(), [0.0, 0.15, 0.3, 0.225, 0.0]),
    (Triangular(height=0.5, sharpness=0.5), [0.0, 0.375, 0.5, 0.4375, 0.25]),
    (Exponential(), [0.135335283236613, 0.606530659712633, 1.0, 0.778800783071405, 0.367879441171442]),
    (Exponential(0.3, 2.0), [0.005494691666620, 0.110363832351433, 0.3, 0.181959197913790, 0.040600584970984]),
    (SuperSpike(), [1 / 441, 1 / 36, 1.0, 4 / 49, 1 / 121]),
    (SuperSpike(height=2.0, sharpness=1.0), [2 / 9, 8 / 9, 2.0, 1.28, 0.5]),
    (ArcTan(), [0.024704523031858, 0.288400439142001, 1.0, 0.618486458158836, 0.091999668350375]),
    (ArcTan(0.1, 1 / math.pi), [0.02, 0.08, 0.1, 1.6 / 17, 0.05]),
    (Sigmoid(), [0.001340950683026, 0.419974341614026, 1.0, 0.786447732965927, 0.070650824853165]),
    (Sigmoid(0.25, 1.0), [0.104993585403507, 0.235003712201594, 0.25, 0.246134082737598, 0.196611933241482]),
    (StraightThrough(), [1.0, 1.0, 1.0, 1.0, 1.0]),
    (StraightThrough(height=0.5, sharpness=1.0), [0.0, 0.5, 0.5, 0.5, 0.5]),
]
ALL = [
    Triangular(),
    Exponential(),
    SuperSpike(),
    ArcTan(),
    Sigmoid(),
    StraightThrough(),
    StraightThrough(sharpness=2.0),
]


@pytest.mark.parametrize(("surrogate", "wanted"), REFERENCE, ids=lambda value: repr(value)[:30])
def test_reference_values_in_both_modes(surrogate, wanted):
    distance = jnp.array(DISTANCES)
    z, tangent = jax.jvp(lambda d: spike(d, surrogate), (distance,), (jnp.full_like(distance, 2.0),))
    np.testing.assert_array_equal(z, [0, 0, 0, 1, 1])
    np.testing.assert_allclose(tangent / 2, wanted, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(lambda d: spike(d, surrogate)))(distance), wanted, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize(
    ("surrogate", "primitive"),
    [
        (ArcTan(), lambda d: jnp.arctan(jnp.pi * d) / jnp.pi),
        (Sigmoid(sharpness=4.0), lambda d: jax.nn.sigmoid(4 * d)),
        (SuperSpike(sharpness=1.0), lambda d: d / (1 + jnp.abs(d))),
    ],
)
def test_what_they_are_the_derivative_of(surrogate, primitive):
    distance = jnp.array([-1.7, -0.3, 0.2, 0.9])
    np.testing.assert_allclose(surrogate(distance), jax.vmap(jax.grad(primitive))(distance), rtol=1e-12)


GAMMA, BETA, THRESHOLD = 0.7, 1.9, 0.6
NEST = {
    # NEST's name: its derivative by the potential, from γ, β and |v - A|, and the surrogate here.
    "piecewise_linear": (
        lambda u: GAMMA * np.maximum(0, 1 - BETA * u),
        Triangular(GAMMA * THRESHOLD, BETA * THRESHOLD),
    ),
    "exponential": (lambda u: GAMMA * np.exp(-BETA * u), Exponential(GAMMA * THRESHOLD, BETA * THRESHOLD)),
    "fast_sigmoid_derivative": (
        lambda u: GAMMA * (1 + BETA * u) ** -2.0,
        SuperSpike(GAMMA * THRESHOLD, BETA * THRESHOLD),
    ),
    "arctan": (
        lambda u: GAMMA / np.pi / (1 + (BETA * np.pi * u) ** 2),
        ArcTan(GAMMA * THRESHOLD / np.pi, BETA * THRESHOLD),
    ),
    "piecewise_linear of Bellec": (
        lambda u: GAMMA / THRESHOLD * np.maximum(0, 1 - BETA * u / THRESHOLD),
        Triangular(GAMMA, BETA),
    ),
}


@pytest.mark.parametrize("name", list(NEST))
def test_derivatives_by_the_potential_are_those_of_nest(name):
    """dz/dv of lif and alif, whose input is the potential here, by NEST's γ and β as the docstring converts them."""
    psi, surrogate = NEST[name]
    one = {"input_kernel": jnp.ones((1, 1))}
    options = {"recurrent": False, "threshold": THRESHOLD, "surrogate": surrogate, "param_dtype": jnp.float64}
    potentials = np.array([-0.2, 0.35, 0.6, 0.62, 0.8, 1.5])
    for cell, above, rest in (
        (lif(1, **options), THRESHOLD, ()),
        (alif(1, beta=0.5, tau_adaptation=1 / math.log(2), **options), 0.7, (0.4,)),
    ):
        carry = (jnp.zeros(1), *(jnp.full(1, leaf) for leaf in rest), jnp.zeros(1))
        slope = jax.vmap(jax.grad(lambda v: cell.apply(one, carry, v[None])[1][0]))(jnp.asarray(potentials))  # noqa: B023
        np.testing.assert_allclose(slope, psi(np.abs(potentials - above)), rtol=1e-12, atol=1e-15)


def test_no_surrogate_is_the_triangle():
    distance = jnp.array([-0.4, 0.0, 0.3])
    for options in ({"dampening": 0.3}, {"dampening": 0.0}, {}):
        plain = jax.vmap(jax.grad(lambda d: triangular_spike(d, **options)))(distance)  # noqa: B023
        np.testing.assert_allclose(plain, options.get("dampening", 0.3) * np.array([0.6, 1.0, 0.7]), rtol=1e-12)
    x, carry = jnp.array([0.8]), (jnp.zeros(1), jnp.zeros(1))

    def slope(**options):
        cell = lif(1, recurrent=False, param_dtype=jnp.float64, **options)
        return jax.grad(lambda x: cell.apply({"input_kernel": jnp.ones((1, 1))}, carry, x)[1][0])(x)

    assert slope() == slope(surrogate=Triangular()) == slope(surrogate=lambda d: 0.3 * jnp.maximum(0, 1 - jnp.abs(d)))
    assert slope(dampening=0.5) == slope(surrogate=Triangular(0.5)) != slope()


@pytest.mark.parametrize("surrogate", ALL, ids=repr)
def test_they_are_values(surrogate):
    """Equal by their numbers, as a key and as a static argument; none can be changed; a cell with one pickles."""
    again = pickle.loads(pickle.dumps(surrogate))
    assert again == surrogate == copy.deepcopy(surrogate) and hash(again) == hash(surrogate)
    assert surrogate != dataclasses.replace(surrogate, height=0.9)
    assert len({*ALL, again}) == len(ALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        surrogate.height = 2.0
    once = jax.jit(chex.assert_max_traces(spike, n=1), static_argnums=1)
    for each in (surrogate, again):
        once(jnp.ones(3), each)
    chex.clear_trace_counter()
    cell = lif(2, surrogate=surrogate, reset="zero", low_pass=True)
    assert pickle.loads(pickle.dumps(cell)).init.made_by[1].keywords == cell.init.made_by[1].keywords
    for dtype in (jnp.float16, jnp.float32, jnp.float64):
        assert surrogate(jnp.ones(3, dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: Triangular(-0.1), ValueError, "height of Triangular.*>= 0; seen -0.1"),
        (lambda: SuperSpike(sharpness=math.nan), ValueError, "sharpness of SuperSpike.*seen nan"),
        (lambda: ArcTan(math.inf), ValueError, "height of ArcTan.*finite"),
        (lambda: lif(2, dampening=-1.0), ValueError, "height of Triangular"),
        (lambda: lif(2, dampening=0.5, surrogate=ArcTan()), ValueError, "dampening=0.5 beside surrogate=ArcTan.*its"),
        (lambda: lif(2, surrogate="arctan"), TypeError, r"seen 'arctan'.*SuperSpike\(\)"),
        (lambda: alif(2, surrogate=ArcTan), TypeError, r"the class ArcTan.*ArcTan\(\)"),
        (lambda: lif(2, surrogate=jnp.sum), TypeError, "array of its shape and dtype.*made"),
        (lambda: lif(2, surrogate=lambda d: (d, d)), TypeError, "array of its shape and dtype.*made"),
    ],
)  # fmt: skip
def test_bad_surrogates(make, error, named):
    with pytest.raises(error, match=named):
        make()
