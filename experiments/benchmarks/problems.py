"""What is computed: the gradient of a summed squared error through a stack of equal cells on random sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepeprop_jax import Cell, linen_cell, stack
from deepeprop_jax.cells import alif, leaky_readout, lru, rtu

LEAK = 0.3


def leaky_tanh(features: int) -> Cell:
    """h_t = (1 - a) h_{t-1} + a tanh(x_t W_x + h_{t-1} W_h + b), y_t = h_t, with one fixed leak a = 0.3."""

    def init(key: jax.Array, x: jax.Array) -> tuple[Any, jax.Array]:
        inputs = x.shape[-1]
        input_key, recurrent_key = jax.random.split(key)
        params = {
            "Wx": jax.random.normal(input_key, (inputs, features)) / inputs**0.5,
            "Wh": jax.random.normal(recurrent_key, (features, features)) / features**0.5,
            "b": jnp.zeros(features),
        }
        return params, jnp.zeros((x.shape[0], features))

    def apply(params: Any, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        drive = x_t @ params["Wx"] + h_tm1 @ params["Wh"] + params["b"]
        h_t = (1 - LEAK) * h_tm1 + LEAK * jnp.tanh(drive)
        return h_t, h_t

    return Cell(init, apply)


def complex_lru(features: int) -> Cell:
    """``lru`` with complex arrays: h_t = λ h_{t-1} + γ (x_t B), y_t = Re(h_t C) + x_t D, products as written."""
    real = lru(features, features)

    def init(key: jax.Array, x: jax.Array) -> tuple[Any, jax.Array]:
        params, carry = real.init(key, x)
        matrices = {name: jax.lax.complex(params.pop(f"{name}_re"), params.pop(f"{name}_im")).T for name in "BC"}
        return params | matrices | {"D": params["D"].T}, carry

    def apply(params: Any, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        eigenvalue = jnp.exp(jax.lax.complex(-jnp.exp(params["nu_log"]), jnp.exp(params["theta_log"])))
        h_t = eigenvalue * h_tm1 + jnp.exp(params["gamma_log"]) * (x_t @ params["B"])
        return h_t, (h_t @ params["C"]).real + x_t @ params["D"]

    return Cell(init, apply)


CELLS: dict[str, Callable[[int], Cell]] = {
    "leaky tanh": leaky_tanh,
    "GRU": lambda features: linen_cell(nn.GRUCell(features)),
    "LSTM": lambda features: linen_cell(nn.LSTMCell(features)),
    "OptimizedLSTM": lambda features: linen_cell(nn.OptimizedLSTMCell(features)),
    "LRU": lambda features: lru(features, features),
    "complex LRU": complex_lru,
    "ALIF": alif,
    "RTU": rtu,
}


def squared_error(y: jax.Array, target: jax.Array) -> jax.Array:
    """Over all outputs (batch, H); one target number per example, (batch,)."""
    return jnp.sum((y - target[:, None]) ** 2)


class Problem(NamedTuple):
    """One network on sequences of one shape.

    Attributes:
      cell: a name from ``CELLS``.
      features: H, units of every layer.
      steps: T.
      batch: examples at once.
      layers: L.
      segment: C, steps of a segment.
      inputs: numbers that enter the first layer per step.
      gate_bias: added to the bias of update and forget gates: 3 makes a memory of some 20 steps.
      readout: units of a leaky readout above the layers; 0 for none.
      scanned: whether the layers are one ``stack(cell, depth=L)``, which takes as many inputs as it has units.
    """

    cell: str
    features: int
    steps: int = 512
    batch: int = 16
    layers: int = 2
    segment: int = 64
    inputs: int = 32
    gate_bias: float = 0
    scanned: bool = False
    readout: int = 0

    def __str__(self) -> str:
        sizes = f"H = {self.features}, L = {self.layers}, batch {self.batch}, T = {self.steps}, C = {self.segment}"
        more = f", gate bias +{self.gate_bias:g}" if self.gate_bias else ""
        more += f", below a leaky readout of {self.readout}" if self.readout else ""
        return f"{self.cell}, {sizes}{more}" + (", stack(cell, depth=L)" if self.scanned else "")

    def network(self) -> Cell:
        """The stack of cells."""
        if self.scanned:
            return stack(stack(CELLS[self.cell](self.features), depth=self.layers))
        above = [leaky_readout(self.readout)] if self.readout else []
        return stack(*[CELLS[self.cell](self.features) for _ in range(self.layers)], *above)

    def data(self) -> tuple[Any, Any, jax.Array, jax.Array]:
        """params, carry, xs (T, batch, inputs), targets (T, batch)."""
        params_key, input_key, target_key = jax.random.split(jax.random.key(0), 3)
        xs = jax.random.normal(input_key, (self.steps, self.batch, self.inputs))
        params, carry = self.network().init(params_key, xs[0])
        if self.gate_bias:
            params = jax.tree_util.tree_map_with_path(self._add_gate_bias, params)
        return params, carry, xs, jax.random.normal(target_key, (self.steps, self.batch))

    def _add_gate_bias(self, path: tuple, leaf: jax.Array) -> jax.Array:
        keys = {getattr(key, "key", None) for key in path}
        return leaf + self.gate_bias if "bias" in keys and keys & {"iz", "hf"} else leaf
