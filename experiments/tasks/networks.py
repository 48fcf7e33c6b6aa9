"""The networks of the experiments."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from deepeprop_jax import Cell, linen_cell, stack
from deepeprop_jax.cells import alif, leaky_readout, lif
from experiments.program.refusal import check_name
from experiments.tasks.arguments import check_at_least

PyTree = Any


class Detector(nn.Module):
    """A layer without memory: y = tanh(W x + b), or y = tanh(W x + b) − tanh(b), relative to its rest.

    Attributes:
      features: number of units.
      bias_scale: standard deviation of the initial biases. At 0 every unit is an odd function of x, so no unit is
        correlated with a vote of XOR-count: training starts on a plateau, which biases of 0.5 avoid.
      from_rest: whether silence, x = 0, gives y = 0. Otherwise a memory above adds up tanh(b) at every silent step.
    """

    features: int
    bias_scale: float = 0.0
    from_rest: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(self.features, bias_init=nn.initializers.normal(self.bias_scale))
        detected = jnp.tanh(layer(x))
        return detected - jnp.tanh(layer(jnp.zeros_like(x))) if self.from_rest else detected


def leaky_detector(features: int, memory: float, bias_scale: float = 0.0, from_rest: bool = False) -> Cell:
    """A detector whose output fades: h_t = ρ h_{t−1} + (1 − ρ) tanh(W x_t + b), y_t = h_t, h_0 = 0.

    ρ = ``memory``; tanh(W x_t + b) is ``Detector``, from rest or not, which it equals at ρ = 0.

    Raises:
      ValueError: ``memory`` is not in [0, 1).
    """
    if not 0 <= memory < 1:
        raise ValueError(f"memory must be in [0, 1); seen {memory!r}.")
    detector = linen_cell(Detector(features, bias_scale, from_rest))

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, jax.Array]:
        params, _ = detector.init(key, x)
        return params, jnp.zeros((len(x), features), x.dtype)

    def apply(params: PyTree, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, detected = detector.apply(params, (), x_t)
        h_t = memory * h_tm1 + (1 - memory) * detected
        return h_t, h_t

    return Cell(init, apply)


def relay(features: int, leak: float = 0.6, recurrent_gain: float = 0.9, input_gain: float = 1.5) -> Cell:
    """A dense leaky tanh layer: h_t = (1 − α) h_{t−1} + α tanh(W u_t + R h_{t−1} + b), y_t = h_t, h_0 = 0.

    α = ``leak`` is fixed. Initially R and W are normal with standard deviation ``recurrent_gain`` / √features and
    ``input_gain`` / √inputs, b = 0. In the code W and R multiply rows from the right.

    Raises:
      ValueError: ``leak`` is not in (0, 1].
    """
    if not 0 < leak <= 1:
        raise ValueError(f"leak must be in (0, 1]; seen {leak!r}.")

    def init(key: jax.Array, u: jax.Array) -> tuple[PyTree, jax.Array]:
        input_key, recurrent_key = jax.random.split(key)
        inputs = u.shape[-1]
        params = {
            "W": input_gain / math.sqrt(inputs) * jax.random.normal(input_key, (inputs, features), u.dtype),
            "R": recurrent_gain / math.sqrt(features) * jax.random.normal(recurrent_key, (features, features), u.dtype),
            "b": jnp.zeros(features, u.dtype),
        }
        return params, jnp.zeros((len(u), features), u.dtype)

    def apply(params: PyTree, h_tm1: jax.Array, u_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h_t = (1 - leak) * h_tm1 + leak * jnp.tanh(u_t @ params["W"] + h_tm1 @ params["R"] + params["b"])
        return h_t, h_t

    return Cell(init, apply)


def integrator(features: int, decay: float, gain: float = 3.0) -> Cell:
    """A linear, element-wise memory: h_t = λ h_{t−1} + (1 − λ) · gain · W u_t, y_t = h_t; λ = ``decay``.

    Raises:
      ValueError: ``decay`` is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1); seen {decay!r}.")

    def init(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight = nn.initializers.lecun_normal()(key, (x.shape[-1], features))
        return weight, jnp.zeros((len(x), features))

    def apply(weight: jax.Array, carry_tm1: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry_t = decay * carry_tm1 + (1 - decay) * gain * (x @ weight)
        return carry_t, carry_t

    return Cell(init, apply)


def rotation(features: int, angle: float) -> np.ndarray:
    """The orthogonal matrix Q = exp(ε (G − Gᵀ) / √(2 features)), (features, features) float64; ε = ``angle``.

    The entries of G are standard normal, and always the same for one size: NumPy's generator with seed 0.
    """
    normal = np.random.default_rng(0).normal(size=(features, features))
    return scipy.linalg.expm(angle * (normal - normal.T) / np.sqrt(2 * features))


def rotated_integrator(features: int, decay: float, angle: float, gain: float = 3.0) -> Cell:
    """A linear memory whose units mix: h_t = λ h_{t−1} Q + (1 − λ) · gain · W u_t, y_t = h_t.

    Q = ``rotation(features, angle)`` is a constant, not a parameter: memories last as long as in ``integrator``, but
    wander from unit to unit, the faster the larger the angle.
    """
    inner = integrator(features, decay, gain)
    mixing = rotation(features, angle)

    def apply(weight: jax.Array, carry_tm1: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return inner.apply(weight, carry_tm1 @ jnp.asarray(mixing, carry_tm1.dtype), x)

    return Cell(inner.init, apply)


def xor_network(
    features: int,
    classes: int,
    decay: float,
    *,
    depth: int = 2,
    memory: float = 0.0,
    angle: float = 0.0,
    bias_scale: float = 0.0,
    from_rest: bool = False,
) -> Cell:
    """``depth`` layers below a linear readout: a detector, depth − 2 relays, an integrator.

    Args:
      memory: of the detector; at 0 it has none, and no carry.
      angle: by which the integrator rotates; at 0 it does not, and is element-wise.
      bias_scale, from_rest: of the detector, see ``Detector``.

    Raises:
      ValueError: ``depth`` below 2, ``features`` below 1.
    """
    check_at_least(1, features=features)
    if depth < 2:
        raise ValueError(f"There is a detector and an integrator, so depth must be >= 2; seen {depth!r}.")
    options = {"bias_scale": bias_scale, "from_rest": from_rest}
    detector = leaky_detector(features, memory, **options) if memory else Detector(features, **options)
    relays = [relay(features) for _ in range(depth - 2)]
    top = rotated_integrator(features, decay, angle) if angle else integrator(features, decay)
    return stack(detector, *relays, top, nn.Dense(classes))


def motif_network(features: int, classes: int) -> Cell:
    """Two dense leaky tanh layers, a fast one (leak 0.5) below a slow one (leak 0.05), and a linear readout."""
    check_at_least(1, features=features)
    return stack(relay(features, leak=0.5), relay(features, leak=0.05), nn.Dense(classes))


def recall_network(features: int, classes: int, decay: float) -> Cell:
    """A GRU layer, which can tell what is worth keeping; a linear memory; a layer without memory; a linear readout."""
    check_at_least(1, features=features)
    return stack(nn.GRUCell(features), integrator(features, decay), Detector(features), nn.Dense(classes))


def _adaptive(features: int, dt: float) -> Cell:
    """Membranes forget in 20 ms, thresholds adapt for 2 s."""
    return alif(features, tau=20, tau_adaptation=2000, beta=0.07, dt=dt, threshold=0.5)


SPIKING = {
    "ALIF": lambda features, dt: [_adaptive(features, dt)],
    "LIF, ALIF": lambda features, dt: [lif(features, tau=20, dt=dt, threshold=0.5), _adaptive(features, dt)],
    "ALIF, tanh": lambda features, dt: [_adaptive(features, dt), Detector(features)],
}
"""Layers from bottom to top, below the readout."""


def spiking_network(features: int, classes: int, cells: str, dt: float) -> Cell:
    """Spiking layers of equal size below a leaky readout of 20 ms.

    Raises:
      Refused: ``cells`` is not a key of ``SPIKING``.
    """
    check_name("choice of spiking cells", cells, SPIKING)
    check_at_least(1, features=features)
    return stack(*SPIKING[cells](features, dt), leaky_readout(classes, tau=20, dt=dt))
