"""Leaky linear readout."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade


def leaky_readout(features: int, *, tau: float = 20.0, dt: float = 1.0, param_dtype: Any = jnp.float32) -> Cell:
    """Leaky linear integrator: the readout of spiking networks, which smooths their spikes.

    κ   = exp(-dt / τ)
    y_t = κ y_{t-1} + x_t W + b

    It has a carry, so it counts as a recurrent node: with ``hops=0`` the layers below do not see what they did to it at
    earlier steps. It is element-wise in its carry, so deep e-prop is exact for it.

    *Units*: ``tau`` and ``dt`` in the same unit, ms by convention.

    *Shapes*: params ``kernel`` (inputs, features), ``bias`` (features,); carry y (features,).

    *Initialisation*: ``kernel`` LeCun normal, ``bias`` 0, y = 0.

    Args:
      features: number of outputs.
      tau: time constant τ of the readout.
      dt: length of one step.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``tau`` or ``dt`` not above 0.

    Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11, 3625 (2020), Methods: network models, the output y_k^t.

    >>> cell = leaky_readout(2)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape
    (3, 2)
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(tau=tau, dt=dt)
    kappa = math.exp(-dt / tau)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        shape = (input_size("leaky_readout", x), features)
        params = {
            "kernel": jax.nn.initializers.lecun_normal()(key, shape, param_dtype),
            "bias": jnp.zeros((features,), param_dtype),
        }
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, y_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_t = kappa * y_tm1 + x_t @ params["kernel"] + params["bias"]
        return y_t, y_t

    return remade(Cell(init, apply), leaky_readout, **arguments)
