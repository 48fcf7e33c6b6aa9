"""Linear Recurrent Unit."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import check_size, input_size, zeros_carry
from deepeprop_jax.cells.ring import check_ring, one_minus_square, uniform_on_ring
from deepeprop_jax.network.cell import Cell, PyTree, remade


def lru(
    features: int,
    state_size: int,
    *,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """LRU: a diagonal complex linear recurrence; element-wise in its carry, so deep e-prop is exact for it.

        λ   = exp(-exp(nu_log) + i exp(theta_log))        γ = exp(gamma_log)
        h_t = λ ∘ h_{t-1} + γ ∘ (B x_t)                    y_t = Re(C h_t) + D x_t

    It is linear: put a non-linear feed-forward layer on top, as the paper does.

    |λ| = exp(-exp(nu_log)) is the decay per step, exp(theta_log) the angle per step in radians.

    *Shapes*: all parameters are real: ``nu_log, theta_log, gamma_log`` (state_size,), ``B_re, B_im`` (state_size,
    inputs), ``C_re, C_im`` (features, state_size), ``D`` (features, inputs); carry h (state_size,), complex.

    *Initialisation*: λ uniform by area on the ring r_min <= |λ| <= r_max, with a phase uniform in (0, ``max_phase``);
    γ = (1 - |λ|²)^½, which gives h the variance of B x for white input; B_re, B_im normal with variance 1 / (2 inputs),
    C_re, C_im normal with variance 1 / state_size, D normal with variance 1 / inputs; h = 0. The paper's D is diagonal
    and needs features = inputs; here it is a matrix.

    Args:
      features: number of outputs.
      state_size: number of complex units.
      r_min, r_max: smallest and largest initial |λ|.
      max_phase: largest initial phase, in radians.
      param_dtype: dtype of the parameters; the carry is of the complex dtype that belongs to it.

    Raises:
      ValueError: a size below 1; not 0 <= r_min < r_max <= 1; not 0 < max_phase <= 2π.

    Reference: A. Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", ICML 2023, section 3:
    exponential parameterisation, Lemma 3.2 (ring), normalisation.

    >>> cell = lru(2, state_size=4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape, bool(jnp.iscomplexobj(carry))
    ((3, 4), True)
    """
    arguments = dict(locals())
    check_size("features", features)
    check_size("state_size", state_size)
    check_ring(r_min, r_max, max_phase)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        inputs = input_size("lru", x)
        keys = iter(jax.random.split(key, 7))

        def normal(shape: tuple[int, int], variance: float) -> jax.Array:
            return math.sqrt(variance) * jax.random.normal(next(keys), shape, param_dtype)

        nu_log, theta_log = uniform_on_ring(next(keys), state_size, r_min, r_max, max_phase, param_dtype)
        params = {
            "nu_log": nu_log,
            "theta_log": theta_log,
            "gamma_log": 0.5 * jnp.log(one_minus_square(nu_log)),
            "B_re": normal((state_size, inputs), 1 / (2 * inputs)),
            "B_im": normal((state_size, inputs), 1 / (2 * inputs)),
            "C_re": normal((features, state_size), 1 / state_size),
            "C_im": normal((features, state_size), 1 / state_size),
            "D": normal((features, inputs), 1 / inputs),
        }
        zeros = zeros_carry(x, state_size, param_dtype)
        return params, jax.lax.complex(zeros, zeros)

    def apply(params: PyTree, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        decay, angle = jnp.exp(-jnp.exp(params["nu_log"])), jnp.exp(params["theta_log"])
        eigenvalue = jax.lax.complex(decay * jnp.cos(angle), decay * jnp.sin(angle))
        gamma = jnp.exp(params["gamma_log"])
        drive = jax.lax.complex(gamma * (params["B_re"] @ x_t), gamma * (params["B_im"] @ x_t))
        h_t = eigenvalue * h_tm1 + drive
        y_t = params["C_re"] @ h_t.real - params["C_im"] @ h_t.imag + params["D"] @ x_t
        return h_t, y_t

    return remade(Cell(init, apply), lru, **arguments)
