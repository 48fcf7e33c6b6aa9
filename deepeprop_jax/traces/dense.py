"""Traces with dense rows, (batch, n, columns): a row per component of the carry."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.units import Units, from_grid, to_grid


def contract(cotangent: jax.Array, trace: jax.Array) -> jax.Array:
    """``lambda . S``, summed over the batch: (batch, n) to (columns,). Cost: one read of the trace."""
    return jnp.einsum("bn,bnp->p", cotangent, trace)


def push(matrix: jax.Array, trace: jax.Array) -> jax.Array:
    """``M S``, (batch, m, columns), for M (batch, m, n). Cost: m multiply-adds per number of the trace."""
    return jnp.einsum("bmn,bnp->bmp", matrix, trace)


def advance(units: Units, recurrence: jax.Array, trace: jax.Array) -> jax.Array:
    """``D S``, for unit-local blocks D (batch, K, K, units). Cost: K multiply-adds per number of the trace."""
    by_unit = to_grid(trace, units, axis=1)  # (batch, K, units, columns)
    moved = [recurrence[:, :, k, :, None] * by_unit[:, None, k] for k in range(by_unit.shape[1])]
    return from_grid(sum(moved[1:], moved[0]), units, axis=1)
