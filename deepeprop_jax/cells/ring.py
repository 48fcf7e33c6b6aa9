"""Eigenvalues λ = exp(-exp(nu_log) + i exp(theta_log)) of diagonal recurrences: where they start, and their scale."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def check_ring(r_min: float, r_max: float, max_phase: float) -> None:
    """A ring in the unit disc, and an angle."""
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(f"The ring needs 0 <= r_min < r_max <= 1; seen r_min={r_min!r}, r_max={r_max!r}.")
    if not 0 < max_phase <= 2 * math.pi:
        raise ValueError(f"max_phase is an angle in (0, 2π]; seen {max_phase!r}.")


def uniform_on_ring(
    key: jax.Array, size: int, r_min: float, r_max: float, max_phase: float, param_dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """``nu_log`` and ``theta_log``: λ uniform by area on r_min <= |λ| <= r_max, its phase uniform in (0, max_phase).

    Reference: A. Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", ICML 2023, Lemma 3.2.
    """
    # Away from 0 and 1, where a logarithm below would be infinite.
    edge = float(jnp.finfo(param_dtype).eps)
    area, phase = jax.random.uniform(key, (2, size), param_dtype, minval=edge, maxval=1 - edge)
    nu_log = jnp.log(-0.5 * jnp.log(area * (r_max**2 - r_min**2) + r_min**2))
    return nu_log, jnp.log(max_phase * phase)


def one_minus_square(nu_log: jax.Array) -> jax.Array:
    """1 - |λ|², with |λ|² = exp(-2 exp(nu_log)); expm1 keeps its digits where |λ| is close to 1."""
    return -jnp.expm1(-2 * jnp.exp(nu_log))
