"""The networks of the experiments."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepeprop_jax import Cell, stack


def digits_network(features: int, classes: int) -> Cell:
    """Two unmodified Flax GRU layers and a linear readout."""
    return stack(nn.GRUCell(features=features), nn.GRUCell(features=features), nn.Dense(classes))


class Detector(nn.Module):
    """A layer without memory: y = tanh(W x + b)."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(nn.Dense(self.features)(x))


def integrator(features: int, decay: float, gain: float = 3.0) -> Cell:
    """A linear, element-wise memory: h_t = λ h_{t−1} + (1 − λ) · gain · W u_t, y_t = h_t."""

    def init(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight = nn.initializers.lecun_normal()(key, (x.shape[-1], features))
        return weight, jnp.zeros((len(x), features))

    def apply(weight: jax.Array, carry_tm1: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry_t = decay * carry_tm1 + (1 - decay) * gain * (x @ weight)
        return carry_t, carry_t

    return Cell(init, apply)


def xor_network(features: int, classes: int, decay: float) -> Cell:
    """A detector without memory, below an integrator without cross-talk, below a linear readout."""
    return stack(Detector(features), integrator(features, decay), nn.Dense(classes))
