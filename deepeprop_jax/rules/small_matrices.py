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
    R = jnp.pad(matrix, ((0, max(columns - rows, 0)), (0, 0)))
    reflections = []
    for j in range(columns):
        x = R[:, j].at[:j].set(0)
        v = x.at[j].add(jnp.where(x[j] < 0, -1, 1).astype(x.dtype) * jnp.linalg.norm(x))
        length = jnp.dot(v, v)
        v = v * jnp.where(length > 0, jnp.sqrt(2 / jnp.where(length > 0, length, 1)), 0)
        R = R - jnp.outer(v, v @ R)
        reflections.append(v)
    Q = jnp.eye(len(R), columns, dtype=R.dtype)
    for v in reversed(reflections):
        Q = Q - jnp.outer(v, v @ Q)
    return Q[:rows], jnp.triu(R[:columns])


def small_svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """L, d, R of a square matrix with L diag(d) Rᵀ = matrix and d falling, by one-sided Jacobi rotations.

    A column of L whose d is zero is zero.
    """
    size = len(matrix)

    def rotate(both: jax.Array, pair: tuple[int, int]) -> jax.Array:
        """Make two columns of the upper half orthogonal; the lower half collects the rotations."""
        i, j = pair
        a, b = both[:size, i], both[:size, j]
        c = jnp.dot(a, b)
        half = (jnp.dot(b, b) - jnp.dot(a, a)) / jnp.where(c == 0, 1, 2 * c)
        tangent = jnp.where(half < 0, -1, 1) / (jnp.abs(half) + jnp.sqrt(1 + half**2))
        tangent = jnp.where(c == 0, 0, tangent)
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        x, y = both[:, i], both[:, j]
        return both.at[:, i].set(cosine * (x - tangent * y)).at[:, j].set(cosine * (y + tangent * x))

    def sweep(_: jax.Array, both: jax.Array) -> jax.Array:
        for pair in itertools.combinations(range(size), 2):
            both = rotate(both, pair)
        return both

    both = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)])
    both = jax.lax.fori_loop(0, SWEEPS, sweep, both)
    d = jnp.linalg.norm(both[:size], axis=0)
    order = jnp.argsort(-d)
    d, both = d[order], both[:, order]
    L = jnp.where(d[None] > 0, both[:size] / jnp.where(d > 0, d, 1)[None], 0)
    return L, d, both[size:]
