"""Every rule without draws equals its oracle, with resets and steps that are not valid; OK does where it is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient as sg

from deepeprop_jax import OnlineLearner, deep_eprop
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.reference import Pair, bptt, stop_gradient_oracle, truncated_bptt
from deepeprop_jax.rules import immediate, kf_rtrl, kronecker_sum, rflo, snap
from tests.gradients import FLOAT64, assert_same_gradient, relative_errors
from tests.zoo import Problem, problem, start

STEPS = 6
RESETS = jnp.zeros((STEPS, 3), bool).at[(2, 4), (1, 0)].set(True)
VALID = jnp.ones((STEPS, 3), bool).at[(1, 3, 5), (0, 2, 1)].set(False)


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


NETWORKS = [
    *("stack_3", "graph_skip"),
    *slow(
        *("stack_5_recurrent", "depth_4_between", "stack_3_spiking"),
        "lru",
        "lif",
        "linen_conv_lstm",
        "stack_2",
        "stack_5",
        "graph_diamond",
        "graph_two_outputs",
        "deep_below_deep",
    ),
]
SHARED = "linen_conv_lstm"
"""A kernel writes to all units in one step: SnAp-1 keeps them all, and what passes between them, which hops=0 cuts."""
PRODUCTS = [
    "stack_2",
    *slow(
        "graph_skip",
        "tower_indrnn_2",
        "tower_lru_1",
        "stack_3",
        "stack_5_recurrent",
        "graph_diamond",
        "stack_5",
        "leaky_rnn",
        "linen_lstm",
    ),
]
"""Networks whose every matrix enters one product."""


def gradient(learner: OnlineLearner, p: Problem) -> PyTree:
    run = jax.jit(learner.value_and_grad(p.loss_fn))
    return run(p.params, start(learner, p), p.xs, p.targets, RESETS, VALID)[1]


def needed(run, p: Problem) -> PyTree:
    return jax.jit(run)(p.params, p.carry, p.xs, p.targets, RESETS, VALID)[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_immediate_and_both_ends_of_snap(name: str) -> None:
    """One step's credit; order 1 keeps a unit's own influence, which is hops=0; what is not cut is BPTT."""
    p = problem(name, steps=STEPS)
    exact = needed(bptt(p.network, p.loss_fn), p)
    one_step = needed(truncated_bptt(p.network, p.loss_fn, 1), p)
    own = needed(stop_gradient_oracle(p.network, p.loss_fn, p.pairs, hops=0), p)
    assert_same_gradient(gradient(immediate(p.network), p), one_step, FLOAT64, name)
    first = gradient(snap(p.network, 1), p)
    if name == SHARED:
        assert max(relative_errors(first, own).values()) > 1e-3
    else:
        assert_same_gradient(first, own, FLOAT64, name)
        assert_same_gradient(first, gradient(deep_eprop(p.network, hops=0), p), FLOAT64, name)
    assert_same_gradient(gradient(snap(p.network, 9), p), exact, FLOAT64, name)
    assert max(relative_errors(one_step, exact).values()) > 1e-3
    if name != "lru":  # one element-wise layer: its own past is all that there is
        assert max(relative_errors(own, exact).values()) > 1e-3


def flax_gate(p: PyTree, name: str, x: jax.Array, h: jax.Array) -> jax.Array:
    """A gate of a Linen cell before its nonlinearity, whose product with the carry passes no derivative."""
    return x @ p["i" + name]["kernel"] + p["i" + name].get("bias", 0.0) + sg(h) @ p["h" + name]["kernel"]


def leaky_without_laterals(p: PyTree, h: jax.Array, x: jax.Array) -> jax.Array:
    a = jax.nn.sigmoid(p["leak"])
    return (1 - a) * h + a * jnp.tanh(x @ p["input_kernel"] + sg(h) @ p["recurrent_kernel"] + p["bias"])


def simple_without_laterals(params: PyTree, h: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(flax_gate(params["params"], "", x, h))


def gru_without_laterals(params: PyTree, h: jax.Array, x: jax.Array) -> jax.Array:
    p = params["params"]
    r, z = (jax.nn.sigmoid(flax_gate(p, name, x, h)) for name in ("r", "z"))
    n = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"] + r * (sg(h) @ p["hn"]["kernel"] + p["hn"]["bias"]))
    return (1 - z) * n + z * h


def lstm_without_laterals(params: PyTree, carry: PyTree, x: jax.Array) -> PyTree:
    p, (c, h) = params["params"], carry
    i, f, g, o = (flax_gate(p, name, x, h) + p["h" + name]["bias"] for name in "ifgo")
    c_t = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c_t, jax.nn.sigmoid(o) * jnp.tanh(c_t)


BY_HAND = {
    "leaky_rnn": leaky_without_laterals,
    "linen_simple": simple_without_laterals,
    "linen_gru": gru_without_laterals,
    "linen_lstm": lstm_without_laterals,
}
"""F of cells whose products with the carry pass no derivative; others of the networks below have no such product."""


@pytest.mark.parametrize("name", ["stack_3", *slow("stack_5_recurrent", "graph_skip", "depth_4", "graph_diamond")])
def test_rflo(name: str) -> None:
    p = problem(name, steps=STEPS)
    pairs = [Pair(BY_HAND.get(cell.name, cell.pair.carry), cell.pair.output) for cell in p.zoo.cells]
    for pair, cell in zip(pairs, p.zoo.cells, strict=True):
        assert pair.carry is not cell.pair.carry or cell.elementwise
    oracle = needed(stop_gradient_oracle(p.network, p.loss_fn, pairs, localise=False, hops=0), p)
    seen = gradient(rflo(p.network), p)
    assert_same_gradient(seen, oracle, FLOAT64, name)
    assert max(relative_errors(seen, gradient(deep_eprop(p.network, hops=0), p)).values()) > 1e-3


@pytest.mark.parametrize("name", PRODUCTS)
def test_as_many_kronecker_products_as_steps_are_exact(name: str) -> None:
    """OK then never has one product too many; with two it has, and what is no matrix is exact all the same."""
    p = problem(name, steps=STEPS)
    exact = needed(bptt(p.network, p.loss_fn), p)
    assert_same_gradient(gradient(kronecker_sum(p.network, STEPS), p), exact, FLOAT64, name)
    for learner in (kf_rtrl(p.network), kronecker_sum(p.network, 1)):
        errors = relative_errors(gradient(learner, p), exact)
        vectors = [leaf.ndim == 1 for leaf in jax.tree.leaves(exact)]
        assert max(error for error, is_vector in zip(errors.values(), vectors, strict=True) if is_vector) < FLOAT64
        assert max(errors.values()) > 1e-3


# --- SnAp between its ends: a ring, in which a unit hears its neighbour alone -----------------------------------------

UNITS = 5
RING = np.eye(UNITS, dtype=bool) | np.roll(np.eye(UNITS, dtype=bool), 1, axis=0)
"""[i, j]: whether unit i hears unit j."""


def ring_carry(params: PyTree, h: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["W"] + h @ (params["R"] * RING.T.astype(h.dtype)) + params["b"])


def ring_gradient(params: PyTree, xs: jax.Array, weights: jax.Array, order: int) -> PyTree:
    """Masked RTRL by dense Jacobians in a Python loop, of the loss Σ weights · h_t²; patterns by powers of a matrix."""
    hears = np.linalg.matrix_power(RING.astype(int), order - 1) > 0
    rows = {"W": (2, UNITS), "R": (UNITS, UNITS), "b": (UNITS,)}
    # An entry of any parameter writes to the unit of its last axis.
    keep = {
        name: jnp.asarray(hears.reshape(UNITS, *(1,) * (len(shape) - 1), UNITS), float) for name, shape in rows.items()
    }
    h = jnp.zeros(UNITS)
    J = {name: jnp.zeros((UNITS, *shape)) for name, shape in rows.items()}
    total = jax.tree.map(jnp.zeros_like, params)
    for x, weight in zip(xs, weights, strict=True):
        D, new = jax.jacfwd(ring_carry, 1)(params, h, x), jax.jacfwd(ring_carry, 0)(params, h, x)
        J = {name: keep[name] * (jnp.tensordot(D, J[name], 1) + new[name]) for name in J}
        h = ring_carry(params, h, x)
        total = {name: total[name] + jnp.tensordot(2 * weight * h, J[name], 1) for name in J}
    return total


@pytest.mark.parametrize("order", [1, 2, 3, UNITS])
def test_snap_keeps_what_is_reached_within_its_order(order: int) -> None:
    network = Cell(None, lambda params, h, x: (ring_carry(params, h, x),) * 2)
    draw = np.random.default_rng(0)
    shapes = {"W": (2, UNITS), "R": (UNITS, UNITS), "b": (UNITS,)}
    params = {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}
    xs, weights, h = jnp.asarray(draw.normal(size=(STEPS, 1, 2))), jnp.arange(1.0, STEPS + 1), jnp.zeros((1, UNITS))

    def loss_fn(y: jax.Array, weight: jax.Array) -> jax.Array:
        return weight * jnp.sum(y**2)

    learner = snap(network, order, connected=RING)
    _, seen = jax.jit(learner.value_and_grad(loss_fn))(params, learner.init(params, h, xs[0]), xs, weights)
    assert_same_gradient(seen, jax.jit(ring_gradient, static_argnums=3)(params, xs[:, 0], weights, order), FLOAT64)
    _, exact = jax.jit(bptt(network, loss_fn))(params, h, xs, weights)
    worst = max(relative_errors(seen, exact).values())
    assert worst < FLOAT64 if order == UNITS else worst > 1e-3
