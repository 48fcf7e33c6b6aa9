"""Situations from public reports in spiking cells: surrogates whose slope is trained, and every way to reset."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import Cell, deep_eprop
from deepeprop_jax.reference import Pair, bptt
from tests.public_reports.situations import (
    BATCH,
    INPUTS,
    STEPS,
    TARGETS,
    UNITS,
    Situation,
    judge,
    kernels,
    loss_fn,
    numbers,
    output_of,
    side_by_side,
)

XS = 2 * numbers(1, STEPS, BATCH, INPUTS, scale=1.0)
SLOPES = jnp.array([0.5, 1.0, 2.0])


def heaviside(v):
    return (v > 0).astype(v.dtype)


def bell(v, slope):
    """The derivative of arctan(slope v) by v; v / slope of it is that by the slope."""
    return slope / (1 + (slope * v) ** 2)


# --- the slope as an argument: what JAX can differentiate ------------------------------------------------------------


@jax.custom_jvp
def by_jvp(v, slope):
    return heaviside(v)


@by_jvp.defjvp
def _by_jvp(primals, tangents):
    (v, slope), (dv, dslope) = primals, tangents
    return by_jvp(v, slope), bell(v, slope) * (dv + v / slope * dslope)


@jax.custom_vjp
def by_vjp(v, slope):
    return heaviside(v)


by_vjp.defvjp(
    lambda v, slope: (by_vjp(v, slope), (v, slope)),
    lambda kept, ct: (bell(*kept) * ct, bell(*kept) * kept[0] / kept[1] * ct),
)


@jax.custom_vjp
def untrained_slope(v, slope):
    return heaviside(v)


untrained_slope.defvjp(
    lambda v, slope: (untrained_slope(v, slope), (v, slope)), lambda kept, ct: (bell(*kept) * ct, None)
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fixed_slope(v, slope):
    return heaviside(v)


@fixed_slope.defjvp
def _fixed_slope(slope, primals, tangents):
    return fixed_slope(*primals, slope), bell(*primals, slope) * tangents[0]


def straight_through(v, slope):
    soft = jax.nn.sigmoid(slope * v)
    return soft + jax.lax.stop_gradient(heaviside(v) - soft)


def closed_over_number(v, slope):
    """A closure over what is no tracer."""
    return fixed_slope(v, 2.0) * slope


# --- the slope by closure or nondiff_argnums: what JAX cannot --------------------------------------------------------


def jvp_closure(v, slope):
    @jax.custom_jvp
    def spike(v):
        return heaviside(v)

    spike.defjvp(lambda primals, tangents: (spike(*primals), bell(*primals, slope) * tangents[0]))
    return spike(v)


def vjp_closure(v, slope):
    @jax.custom_vjp
    def spike(v):
        return heaviside(v)

    spike.defvjp(lambda v: (spike(v), v), lambda v, ct: (bell(v, slope) * ct,))
    return spike(v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def vjp_nondiff(v, slope):
    return heaviside(v)


vjp_nondiff.defvjp(lambda v, slope: (heaviside(v), v), lambda slope, v, ct: (bell(v, slope) * ct,))


def lif(spike, p, carry, x):
    v, z = carry
    v = 0.8 * v * (1 - z) + x @ p["W"] + z @ p["U"] + p["b"]
    return v, spike(v - 0.5, p["slope"])


def encoder(spike, p, carry, x):
    """A layer of spikes without a carry."""
    return (), spike(x @ p["W"] - 0.5, p["slope"])


def potentials(seed):
    return numbers(seed, BATCH, UNITS), (numbers(seed + 1, BATCH, UNITS) > 0).astype(float)


@pytest.mark.parametrize(
    "spike", [jvp_closure, vjp_closure, fixed_slope, vjp_nondiff], ids=lambda spike: spike.__name__
)
@pytest.mark.parametrize("carry", [(), potentials(5)], ids=["encoder", "lif"])
def test_a_rule_that_reads_a_parameter_from_outside_is_refused(spike, carry):
    """``jax.grad`` through a scan fails too, and says nothing of where."""
    pair = Pair(functools.partial(lif, spike), output_of(1))
    cell, params = Cell(None, pair.apply if carry else functools.partial(encoder, spike)), kernels(1, slope=SLOPES)
    with pytest.raises(TypeError):
        bptt(cell, loss_fn)(params, carry, XS, TARGETS)
    with pytest.raises(ValueError, match=r"Node 'cell'.*closure, or as one of nondiff_argnums.*Make it an argument"):
        deep_eprop(cell).init(params, carry, XS[0])


# --- resets ----------------------------------------------------------------------------------------------------------


def reset_at_once(kind, detached, p, carry, x):
    """The potential is reset in the step of the spike; what is carried is what is left of it."""
    v, z = carry
    v = 0.8 * v + x @ p["W"] + z @ p["U"] + p["b"]
    z = by_jvp(v - 0.5, 1.5)
    off = jax.lax.stop_gradient(z) if detached else z
    return {"soft": v - 0.5 * off, "scaled": v - p.get("reset", 1) * off, "hard": v * (1 - off)}[kind], z


def reset_at_next(kind, detached, p, carry, x):
    """The potential is reset at the next step, by the spike that is carried."""
    v, z = carry
    off = jax.lax.stop_gradient(z) if detached else z
    drive = x @ p["W"] + z @ p["U"] + p["b"]
    left = {"soft": 0.8 * v - 0.5 * off, "scaled": 0.8 * (v - p.get("reset", 1) * off), "hard": 0.8 * v * (1 - off)}
    v = left[kind] + drive
    return v, by_jvp(v - 0.5, 1.5)


@pytest.mark.slow
def test_trained_slopes():
    spikes = (by_jvp, by_vjp, straight_through, closed_over_number, untrained_slope)
    situations = {
        spike.__name__: Situation(
            Pair(functools.partial(lif, spike), output_of(1)), kernels(10 * i, slope=SLOPES), potentials(10 * i + 5)
        )
        for i, spike in enumerate(spikes)
    }
    judge(*side_by_side(situations), XS, must_differ=True, without_gradient=("['untrained_slope']['slope']",))


# The zoo's LIF and ALIF cells reset at the next step.
@pytest.mark.parametrize("step", [reset_at_once, pytest.param(reset_at_next, marks=pytest.mark.slow)])
def test_resets_soft_scaled_and_hard(step):
    situations = {}
    for i, (kind, detached) in enumerate(itertools.product(("soft", "scaled", "hard"), (False, True))):
        reset = {"reset": numbers(i, UNITS)} if kind == "scaled" else {}
        pair = Pair(functools.partial(step, kind, detached), output_of(1))
        name = f"{kind}_detached" if detached else kind
        situations[name] = Situation(pair, kernels(100 + 10 * i, **reset), potentials(105 + 10 * i))
    judge(*side_by_side(situations), XS, must_differ=True)
