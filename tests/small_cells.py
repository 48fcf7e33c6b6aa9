"""Small cells with their F and g, and a gradient by Python loops, for the tests of the references."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from deepeprop_jax.network.build import stack
from deepeprop_jax.network.cell import Cell
from deepeprop_jax.reference import Pair
from tests.gradients import assert_same_gradient, relative_errors

TOLERANCE = 1e-11  # sums of some hundred products in float64, of order one
STEPS, BATCH, INPUTS = 5, 2, 3


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def tanh_pair(outputs: int = 3) -> Pair:
    """A dense tanh layer whose output mixes units and reads the old carry, so that F and g both matter."""

    def new_carry(params, carry_tm1, x):
        return jnp.tanh(carry_tm1 @ params["w"] + x @ params["u"] + params["b"])

    def output(params, carry_t, carry_tm1, x):
        return carry_t @ params["v"] + 0.3 * jnp.sin(carry_tm1.sum()) + x.sum() * jnp.arange(outputs, dtype=x.dtype)

    return Pair(new_carry, output)


def tanh_cell(units: int, outputs: int = 3) -> Cell:
    def init(key, x):
        shapes = {"w": (units, units), "u": (x.shape[-1], units), "b": (units,), "v": (units, outputs)}
        keys = jax.random.split(key, 5)
        params = {name: 0.6 * jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=False)}
        return params, 0.5 * jax.random.normal(keys[4], (x.shape[0], units))

    return Cell(init, tanh_pair(outputs).apply)


readout_pair = Pair(lambda w, carry, x: (), lambda w, carry_t, carry_tm1, x: jnp.tanh(x @ w))


def readout_cell(outputs: int) -> Cell:
    return Cell(lambda key, x: (jax.random.normal(key, (x.shape[-1], outputs)), ()), readout_pair.apply)


def squared_error(y, target):
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(y))


def problem(network: Cell, steps: int = STEPS):
    params, carry = network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS)))
    return params, carry, normal(1, steps, BATCH, INPUTS), normal(2, steps, BATCH, 3)


def by_hand(apply, loss_fn=squared_error, cut=lambda t: False):
    """``run`` as a Python loop over steps and examples, with Python's own ``if`` for resets, valid and cuts."""

    def run(params, carry, xs, targets, resets=None, valid=None):
        def total(params):
            initial = [jax.tree.map(lambda leaf, b=b: leaf[b], carry) for b in range(BATCH)]
            now, loss = list(initial), 0.0
            for t in range(len(xs)):
                outputs = []
                for b in range(BATCH):
                    before = initial[b] if resets is not None and resets[t, b] else now[b]
                    after, y = apply(params, sg(before) if cut(t) else before, xs[t, b])
                    held = valid is not None and not valid[t, b]
                    now[b] = before if held else after
                    outputs.append(sg(y) if held else y)
                loss += loss_fn(jax.tree.map(lambda *ys: jnp.stack(ys), *outputs), targets[t])
            return loss, jax.tree.map(lambda *parts: jnp.stack(parts), *now)

        return jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))(params)

    return run


def assert_same(seen, wanted, tolerance=TOLERANCE):
    assert jax.tree.structure(seen) == jax.tree.structure(wanted)
    assert_same_gradient(seen, wanted, tolerance)


def differs(seen, wanted) -> bool:
    return any(error > 1e-3 for error in relative_errors(seen, wanted).values())


def two_layers() -> Cell:
    return stack(tanh_cell(4), tanh_cell(2))


complex_pair = Pair(
    # A complex state, a step counter, a key that advances, and an integer parameter.
    lambda params, h, x: {
        "z": params["decay"] * h["z"]
        + x.astype(complex) @ params["b"]
        + 0.1 * jax.random.normal(h["key"], h["z"].shape).astype(complex),
        "count": h["count"] + params["stride"],
        "key": jax.random.fold_in(h["key"], 1),
    },
    lambda params, h_t, h_tm1, x: (h_t["z"] @ params["c"]).real + h_tm1["z"].imag.sum() + h_t["count"].astype(float),
)


@functools.cache
def complex_problem():
    def init(key, x):
        del key
        params = {
            "decay": jax.lax.complex(0.5 * normal(3, 4), 0.5 * normal(4, 4)),
            "b": jax.lax.complex(normal(5, x.shape[-1], 4), normal(6, x.shape[-1], 4)),
            "c": jax.lax.complex(normal(7, 4, 3), normal(8, 4, 3)),
            "stride": jnp.int32(2),
        }
        carry = {
            "z": jax.lax.complex(normal(9, BATCH, 4), normal(10, BATCH, 4)),
            "count": jnp.zeros(BATCH, jnp.int32),
            "key": jax.random.split(jax.random.key(11), BATCH),
        }
        return params, carry

    network = Cell(init, complex_pair.apply)
    return network, problem(network)


def without_keys(result):
    (loss, carry), grads = result
    return (loss, {**carry, "key": jax.random.key_data(carry["key"]).astype(jnp.int64)}), grads
