"""Recurrent trace units."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import changed, check_size, input_size, zeros_carry
from deepeprop_jax.cells.ring import check_ring, one_minus_square, uniform_on_ring
from deepeprop_jax.network.cell import Cell, PyTree, remade


def rtu(
    features: int,
    *,
    linear: bool = False,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """RTU: a complex diagonal recurrence as pairs of real numbers, with an activation; deep e-prop is exact for it.

        r   = exp(-exp(nu_log))    θ = exp(theta_log)    g = r cos θ    φ = r sin θ    γ = (1 - r²)^½
        a_t = g ∘ h1_{t-1} - φ ∘ h2_{t-1} + γ ∘ (x_t W_1)
        b_t = g ∘ h2_{t-1} + φ ∘ h1_{t-1} + γ ∘ (x_t W_2)
        h1_t, h2_t = activation(a_t), activation(b_t)                   y_t = (h1_t, h2_t), concatenated

    With ``linear=True`` the recurrence has no activation, and the output has it: h1_t, h2_t = a_t, b_t and
    y_t = activation((h1_t, h2_t)). Both parts of a unit depend on their own past alone.

    Unlike in ``lru``, γ is not a parameter of its own but moves with r, the input has a matrix for each part, and both
    parts are the output, so that no matrix reads them.

    *Shapes*: params ``nu_log``, ``theta_log`` (features,), ``input_kernel_1`` W_1 and ``input_kernel_2`` W_2 (inputs,
    features); carry (h1, h2), each (features,); output (2 features,).

    *Initialisation*: g + i φ uniform by area on the ring r_min <= r <= r_max, with a phase θ uniform in
    (0, ``max_phase``); W_1, W_2 LeCun normal; h1 = h2 = 0.

    Args:
      features: number of units, of two numbers each; the output has 2 · ``features``.
      linear: linear recurrence, activation on the output alone.
      activation: element-wise function; the rectifier in the authors' code.
      r_min, r_max: smallest and largest initial r.
      max_phase: largest initial phase, in radians.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; not 0 <= r_min < r_max <= 1; not 0 < max_phase <= 2π.

    Reference: E. Elelimy, A. White, M. Bowling and M. White, "Real-Time Recurrent Learning using Trace Units in
    Reinforcement Learning", NeurIPS 2024: recurrent trace units, non-linear and linear.

    >>> cell = rtu(4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> [h.shape for h in carry], jax.vmap(cell.apply, (None, 0, 0))(params, carry, jnp.zeros((3, 5)))[1].shape
    ([(3, 4), (3, 4)], (3, 8))
    """
    arguments = dict(locals())
    check_size("features", features)
    check_ring(r_min, r_max, max_phase)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        ring_key, *kernel_keys = jax.random.split(key, 3)
        shape = (input_size("rtu", x), features)
        nu_log, theta_log = uniform_on_ring(ring_key, features, r_min, r_max, max_phase, param_dtype)
        kernels = [jax.nn.initializers.lecun_normal()(key, shape, param_dtype) for key in kernel_keys]
        params = {"nu_log": nu_log, "theta_log": theta_log, "input_kernel_1": kernels[0], "input_kernel_2": kernels[1]}
        zeros = zeros_carry(x, features, param_dtype)
        return params, (zeros, zeros)

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        h1_tm1, h2_tm1 = carry_tm1
        r, theta = jnp.exp(-jnp.exp(params["nu_log"])), jnp.exp(params["theta_log"])
        g, phi, gamma = r * jnp.cos(theta), r * jnp.sin(theta), jnp.sqrt(one_minus_square(params["nu_log"]))
        a_t = g * h1_tm1 - phi * h2_tm1 + gamma * (x_t @ params["input_kernel_1"])
        b_t = g * h2_tm1 + phi * h1_tm1 + gamma * (x_t @ params["input_kernel_2"])
        if linear:
            return (a_t, b_t), activation(jnp.concatenate([a_t, b_t]))
        h1_t, h2_t = activation(a_t), activation(b_t)
        return (h1_t, h2_t), jnp.concatenate([h1_t, h2_t])

    return remade(Cell(init, apply), rtu, **changed(rtu, arguments))
