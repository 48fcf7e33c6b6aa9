"""braintrace's own cells under its own rules, and the same cells here (``pip install braintrace``, Python >= 3.12).

Its rules keep ∂h/∂θ of a parameter's own layer. They differ in how much of ∂h_t/∂h_{t-1} moves it: ``D_RTRL``, nothing
that goes through a recurrent weight; ``OSTLRecurrent``, its diagonal too (SnAp-1); ``SnAp(2)``, all of it in a dense
layer. ``ES_D_RTRL`` has two smoothed factors for a weight in place of its trace.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax import Cell
from experiments.peers.network import Gradient, Sizes, Theirs, linear, loss_fn

CELLS = ("tanh", "GRU", "LSTM", "LRU")


def missing() -> str | None:
    """Why it cannot run here; None where it can."""
    return None if importlib.util.find_spec("braintrace") else "braintrace is not installed"


def network(cell: str, sizes: Sizes, seed: int) -> Theirs:
    """Two layers of one of ``CELLS`` and a readout, with braintrace's own initial weights."""
    import brainstate
    import braintrace

    brainstate.random.seed(seed)
    own = _network(cell, sizes)
    weights = own.states(brainstate.ParamState)

    def layers(values: dict[tuple, Any]) -> tuple[dict[str, Any], ...]:
        found: tuple[dict[str, Any], ...] = ({}, {}, {})
        for path, value in values.items():
            layer, name = (path[1], path[2]) if path[0] == "layers" else (2, path[0])
            found[layer][name] = value
        return found

    def bptt(xs: jax.Array, targets: jax.Array) -> tuple[dict[str, Any], ...]:
        def total() -> jax.Array:
            brainstate.nn.init_all_states(own, batch_size=sizes.batch)
            return jnp.sum(brainstate.transform.for_loop(lambda x, target: loss_fn(own(x), target), xs, targets))

        return layers(brainstate.transform.grad(total, weights)())

    def by_rule(algorithm: Any, options: dict[str, Any], xs: jax.Array, targets: jax.Array) -> tuple:
        learner = braintrace.compile(own, algorithm, xs[0], batch_size=sizes.batch, **options)
        step = lambda x, target: loss_fn(learner(x), target)  # noqa: E731
        return layers(learner.etrace_grad(xs, targets, step_fn=step, reduction="sum"))

    rules: dict[str, Gradient] = {
        "D_RTRL": partial(by_rule, braintrace.D_RTRL, {}),
        "OSTLRecurrent": partial(by_rule, braintrace.OSTLRecurrent, {}),
        "SnAp(2)": partial(by_rule, braintrace.SnAp, {"n": 2}),
        "ES_D_RTRL": partial(by_rule, braintrace.ES_D_RTRL, {"decay_or_rank": 0.9}),
    }
    params = layers({path: state.value for path, state in weights.items()})
    *recurrent, readout = params
    cells = (*[same(cell, sizes.units, weights) for weights in recurrent], Cell(_given(readout, ()), _readout))
    return Theirs(params, bptt, rules, cells)


def _network(cell: str, sizes: Sizes) -> Any:
    import brainstate
    import braintrace

    make: dict[str, Callable[[int, int], Any]] = {
        "tanh": partial(braintrace.nn.ValinaRNNCell, activation="tanh"),
        "GRU": braintrace.nn.GRUCell,
        "LSTM": braintrace.nn.LSTMCell,
        "LRU": braintrace.nn.LRUCell,
    }

    class Network(brainstate.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [make[cell](sizes.units, sizes.units) for _ in range(2)]
            self.readout = braintrace.nn.Linear(sizes.units, sizes.outputs)

        def update(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return self.readout(x)

    return Network()


def same(cell: str, units: int, params: dict[str, Any]) -> Cell:
    """The mathematics of a cell of theirs with its weights, as a cell of this library; the carry starts at 0."""
    step, leaves = {"tanh": (_tanh, 1), "GRU": (_gru, 1), "LSTM": (_lstm, 2), "LRU": (_lru, 2)}[cell]
    return Cell(_given(params, jnp.zeros(units) if leaves == 1 else (jnp.zeros(units),) * leaves), step)


def _given(params: Any, carry: Any) -> Callable[..., tuple[Any, Any]]:
    """An initialiser: these parameters, and this carry for every example."""

    def init(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        return params, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x), *leaf.shape)), carry)

    return init


def _readout(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    return carry, linear(params["readout"], x)


def _tanh(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = jnp.tanh(linear(params["W"], jnp.concatenate([x, h])))
    return h, h


def _gru(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    xh = jnp.concatenate([x, h])
    z, r = jax.nn.sigmoid(linear(params["Wz"], xh)), jax.nn.sigmoid(linear(params["Wr"], xh))
    h = (1 - z) * h + z * jnp.tanh(linear(params["Wh"], jnp.concatenate([x, r * h])))
    return h, h


def _lstm(params: Any, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
    c, h = carry
    i, g, f, o = (linear(params[name], jnp.concatenate([x, h])) for name in ("Wi", "Wg", "Wf", "Wo"))
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def _lru(params: Any, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
    re, im = carry
    decay, angle = jnp.exp(-jnp.exp(params["nu_log"])), jnp.exp(params["theta_log"])
    cos, sin, gamma = decay * jnp.cos(angle), decay * jnp.sin(angle), jnp.exp(params["gamma_log"])
    re, im = (
        cos * re - sin * im + gamma * linear(params["B_re"], x),
        sin * re + cos * im + gamma * linear(params["B_im"], x),
    )
    return (re, im), linear(params["C_re"], re) - linear(params["C_im"], im) + params["D"] * x
