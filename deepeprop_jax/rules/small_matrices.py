"""QR and SVD of matrices with a few columns, in plain JAX.

On a CPU ``jnp.linalg`` hands many matrices at once to LAPACK on other threads, and waits for ever where there is but
one (seen with JAX 0.10 and NPROC=1). Both are exact to rounding for matrices of any rank.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

SWEEPS = 12
"""Of Jacobi rotations over all pairs of columns; up to nine columns seven sweeps have been enough in float64."""


def thin_qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q (rows, columns) and R (columns, columns) with Q R = matrix, by Householder's reflections.

    Q has orthonormal columns, if there are as many rows; else it is the upper part of one that has.
    """
    rows, columns = matrix.shape
    padded = jnp.pad(matrix, ((0, max(columns - rows, 0)), (0, 0)))
    place = jnp.arange(len(padded))

    def reflect(j: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        R, vectors = so_far
        x = jnp.where(place < j, 0, R[:, j])
        v = x.at[j].add(jnp.where(x[j] < 0, -1, 1).astype(x.dtype) * jnp.linalg.norm(x))
        length = jnp.dot(v, v)
        v = v * jnp.where(length > 0, jnp.sqrt(2 / jnp.where(length > 0, length, 1)), 0)
        return R - jnp.outer(v, v @ R), vectors.at[j].set(v)

    def unfold(step: jax.Array, Q: jax.Array) -> jax.Array:
        v = vectors[columns - 1 - step]
        return Q - jnp.outer(v, v @ Q)

    R, vectors = jax.lax.fori_loop(0, columns, reflect, (padded, jnp.zeros_like(padded, shape=padded.shape[::-1])))
    Q = jax.lax.fori_loop(0, columns, unfold, jnp.eye(*padded.shape, dtype=R.dtype))
    return Q[:rows], jnp.triu(R[:columns])


def small_svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """L, d, R of a square matrix with L diag(d) Rᵀ = matrix and d falling, by one-sided Jacobi rotations.

    A column of L whose d is zero is zero.
    """
    size = len(matrix)

    def rotate(both: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        """Make two columns of the upper half orthogonal; the lower half collects the rotations."""
        x, y = both[:, pair[0]], both[:, pair[1]]
        a, b = x[:size], y[:size]
        c = jnp.dot(a, b)
        half = (jnp.dot(b, b) - jnp.dot(a, a)) / jnp.where(c == 0, 1, 2 * c)
        tangent = jnp.where(half < 0, -1, 1) / (jnp.abs(half) + jnp.sqrt(1 + half**2))
        tangent = jnp.where(c == 0, 0, tangent)
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        turned = jnp.stack([cosine * (x - tangent * y), cosine * (y + tangent * x)], axis=1)
        return both.at[:, pair].set(turned), None

    pairs = jnp.array([*itertools.combinations(range(size), 2)] * SWEEPS, jnp.int32).reshape(-1, 2)
    both = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)])
    both, _ = jax.lax.scan(rotate, both, pairs)
    d = jnp.linalg.norm(both[:size], axis=0)
    order = jnp.argsort(-d)
    d, both = d[order], both[:, order]
    L = jnp.where(d[None] > 0, both[:size] / jnp.where(d > 0, d, 1)[None], 0)
    return L, d, both[size:]
