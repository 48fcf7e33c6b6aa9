"""Situations from public reports, in cells as users write them: what they feed, keep and nest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.reference import Pair
from tests.public_reports.situations import (
    BATCH,
    INPUTS,
    STEPS,
    UNITS,
    Situation,
    judge,
    kernels,
    numbers,
    output_of,
    side_by_side,
)

FIRST = jnp.asarray(np.random.default_rng(3).random((STEPS, BATCH)) < 0.3).at[0].set(True).at[4, 1].set(True)
XS = {
    "x": numbers(1, STEPS, BATCH, INPUTS, scale=1.0),
    "first": FIRST,
    "kept": jnp.asarray(np.random.default_rng(2).random((STEPS, BATCH, UNITS)) < 0.7),
}


def tanh(p, h, x):
    return jnp.tanh(x @ p["W"] + h @ p["U"] + p["b"])


def learnt_start(p, h, x):
    """A learnt initial carry: ``first`` marks the steps that start an episode."""
    return tanh(p, jnp.where(x["first"], p["start"], h), x["x"])


def learnt_start_of_an_lstm(p, carry, x):
    c, h = jax.tree.map(lambda start, leaf: jnp.where(x["first"], start, leaf), p["start"], carry)
    i, f, g, o = jnp.split(x["x"] @ p["W"] + h @ p["U"] + p["b"], 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


def dropped(drop: str, p, h, x):
    """Dropout by a mask in x: of the old carry, of the update, or of the weights' product."""
    kept = jnp.where(x["kept"], 1 / 0.7, 0.0)
    if drop == "recurrent":
        return tanh(p, kept * h, x["x"])
    if drop == "update":
        return 0.8 * h + 0.2 * kept * tanh(p, h, x["x"])
    return jnp.tanh(x["x"] @ p["W"] + kept * (h @ p["U"]) + p["b"])


def dropped_by_key(p, carry, x):
    """Dropout by a key in the carry, typed or raw: a new mask each step."""
    h, key = carry
    key, now = jax.random.split(key)
    return tanh(p, jnp.where(jax.random.bernoulli(now, 0.7, (UNITS,)), h / 0.7, 0), x["x"]), key


def counted(p, carry, x):
    """An integer counter, and a leak that depends on it."""
    h, count = carry
    leak = 1 / (2 + count.astype(h.dtype))
    return (1 - leak) * h + leak * tanh(p, h, x["x"]), count + 1


def heads(p, h, x):
    """Two heads, each with its own weights: an inner ``vmap`` over both weights and carry."""
    return jax.vmap(tanh, in_axes=(0, 0, None))(p, h, x["x"])


def shared_heads(p, h, x):
    """Two heads with the same weights."""
    return jax.vmap(tanh, in_axes=(None, 0, 0))(p, h, jnp.stack([x["x"], jnp.sin(x["x"])]))


def unit_by_unit(p, h, x):
    """A user who writes one unit and maps it over the units; each unit sees all of h."""

    def unit(w, u, b):
        return jnp.tanh(jnp.vdot(w, x["x"]) + jnp.vdot(u, h) + b)

    return jax.vmap(unit, in_axes=(1, 1, 0))(p["W"], p["U"], p["b"])


def unit_alone(p, h, x):
    """The same without lateral weights, so that deep e-prop is exact for it."""

    def unit(w, u, b, h):
        return jnp.tanh(w @ x["x"] + u * h + b)

    return jax.vmap(unit, in_axes=(1, 0, 0, 0))(p["W"], p["u"], p["b"], h)


def one(step, params, output=None, carry=None):
    """A situation whose carry is one array of ``UNITS`` numbers, or as given."""
    return Situation(Pair(step, output_of(output)), params, numbers(9, BATCH, UNITS) if carry is None else carry)


def with_axis(count, seed):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[kernels(seed + 5 * i) for i in range(count)])


def test_learnt_initial_carries_with_and_without_resets():
    h = numbers(10, BATCH, UNITS)
    wide = {"W": numbers(1, INPUTS, 4 * UNITS), "U": numbers(2, UNITS, 4 * UNITS), "b": numbers(3, 4 * UNITS)}
    network, pairs, params, carry = side_by_side(
        {
            "tanh": one(learnt_start, kernels(10, start=numbers(4, UNITS))),
            "lstm": one(
                learnt_start_of_an_lstm, wide | {"start": (numbers(5, UNITS), numbers(6, UNITS))}, 1, (h, jnp.sin(h))
            ),
        }
    )
    # None; the library's own at the same steps, back to the carry of init, which ``first`` then replaces; and at other
    # steps, where they go back to that constant.
    resets = (jnp.zeros_like(FIRST), FIRST, jnp.roll(FIRST, 1, axis=1))
    judge(network, pairs, params, carry, XS, resets=resets, must_differ=True)


def test_masks_keys_counters_and_inner_vmaps():
    h = numbers(11, BATCH, UNITS)
    keys = jax.random.split(jax.random.key(5), BATCH)
    situations = {
        f"mask_{drop}": one(functools.partial(dropped, drop), kernels(20 + i))
        for i, drop in enumerate(("recurrent", "update", "product"))
    } | {
        "typed_key": one(dropped_by_key, kernels(30), 0, (h, keys)),
        "raw_key": one(dropped_by_key, kernels(31), 0, (h, jax.random.key_data(keys))),
        "counter": one(counted, kernels(32), 0, (h, jnp.arange(BATCH, dtype=jnp.int32))),
        "heads": one(heads, with_axis(2, 40), carry=numbers(12, BATCH, 2, UNITS)),
        "shared_heads": one(shared_heads, kernels(50), carry=numbers(13, BATCH, 2, UNITS)),
        "unit_by_unit": one(unit_by_unit, kernels(60)),
        "unit_alone": one(unit_alone, {"W": numbers(1, INPUTS, UNITS), "u": numbers(2, UNITS), "b": numbers(3, UNITS)}),
    }
    judge(*side_by_side(situations), XS, must_differ=True)
