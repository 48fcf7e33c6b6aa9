"""Second moments Σ of vectors with N numbers: whole, N x N, or where N is large as a sketch of m rows, Σ ~ Fᵀ F.

For rows A of vectors, Ω A with random signs Ω / √m, (m, rows), has E (Ω A)ᵀ (Ω A) = Aᵀ A (Johnson & Lindenstrauss
1984). Sketches with signs of their own add up as the moments do: the products between them have mean zero.
"""

from __future__ import annotations

import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.learner.balanced_truncation import square_root

LARGE = 1000
"""Above so many numbers a sketch is taken if nothing is said."""
ROWS = 128
"""Of such a sketch."""


class Moments(Protocol):
    """How moments are held. An array of theirs has shape ``shape(N)``, or axes more in front."""

    def shape(self, numbers: int) -> tuple[int, int]:
        """Of one array."""
        ...

    def unknown(self, key: jax.Array, numbers: int, dtype: np.dtype) -> jax.Array:
        """Of vectors that point anywhere, of trace one."""
        ...

    def of(self, key: jax.Array, rows: jax.Array) -> jax.Array:
        """cov(a) = aᵀ a / tr(aᵀ a) of rows (any, N); zero for zero."""
        ...

    def trace(self, held: jax.Array) -> jax.Array:
        """Per array."""
        ...

    def mixed(self, old: jax.Array, new: jax.Array, share: jax.Array | float) -> jax.Array:
        """(1 - share) old + share new, for arrays made with other keys."""
        ...

    def of_trace_one(self, held: jax.Array) -> jax.Array:
        """Scaled; zero for zero."""
        ...

    def roots(self, held: jax.Array, ridge: float) -> jax.Array:
        """L of L Lᵀ = Σ, (..., N, any), of Σ in any scale."""
        ...

    def root_of_mean(self, held: jax.Array, ridge: float) -> jax.Array:
        """L of the mean of several, (J, ...)."""
        ...


class Whole:
    """N x N."""

    def shape(self, numbers: int) -> tuple[int, int]:
        return numbers, numbers

    def unknown(self, key: jax.Array, numbers: int, dtype: np.dtype) -> jax.Array:
        return jnp.eye(numbers, dtype=dtype) / max(numbers, 1)

    def of(self, key: jax.Array, rows: jax.Array) -> jax.Array:
        return self.of_trace_one(rows.T @ rows)

    def trace(self, held: jax.Array) -> jax.Array:
        return jnp.trace(held, axis1=-2, axis2=-1)

    def mixed(self, old: jax.Array, new: jax.Array, share: jax.Array | float) -> jax.Array:
        return old + share * (new - old)

    def of_trace_one(self, held: jax.Array) -> jax.Array:
        total = self.trace(held)[..., None, None]
        return held / jnp.where(total > 0, total, 1)

    def roots(self, held: jax.Array, ridge: float) -> jax.Array:
        over = square_root if held.ndim == 2 else jax.vmap(square_root, (0, None))
        return over(held, ridge)

    def root_of_mean(self, held: jax.Array, ridge: float) -> jax.Array:
        return square_root(held.mean(0), ridge)


class Sketch:
    """F, (m, N).

    Args:
      rows: m.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def shape(self, numbers: int) -> tuple[int, int]:
        return self.rows, numbers

    def unknown(self, key: jax.Array, numbers: int, dtype: np.dtype) -> jax.Array:
        return self.of_trace_one(jax.random.normal(key, (self.rows, numbers), dtype))

    def of(self, key: jax.Array, rows: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(key, (self.rows, len(rows)), rows.dtype)
        size = jnp.sqrt(jnp.square(rows).sum())
        return signs @ (rows / (jnp.where(size > 0, size, 1) * math.sqrt(self.rows)))

    def trace(self, held: jax.Array) -> jax.Array:
        return jnp.square(held).sum((-2, -1))

    def mixed(self, old: jax.Array, new: jax.Array, share: jax.Array | float) -> jax.Array:
        return jnp.sqrt(1 - share) * old + jnp.sqrt(share) * new

    def of_trace_one(self, held: jax.Array) -> jax.Array:
        size = jnp.sqrt(self.trace(held))[..., None, None]
        return held / jnp.where(size > 0, size, 1)

    def roots(self, held: jax.Array, ridge: float) -> jax.Array:
        if ridge:  # m rows more, whose moments are in the mean those of the ridge
            numbers = held.shape[-1]
            random = jax.random.normal(jax.random.key(0), (self.rows, numbers), held.dtype)
            size = jnp.sqrt(self.trace(held))[..., None, None] * math.sqrt(ridge / (numbers * self.rows))
            held = jnp.concatenate([held, jnp.broadcast_to(random, held.shape) * size], axis=-2)
        return jnp.swapaxes(held, -2, -1)

    def root_of_mean(self, held: jax.Array, ridge: float) -> jax.Array:
        every = self.roots(held, ridge)  # (J, N, any)
        return jnp.moveaxis(every, 0, 1).reshape(held.shape[-1], -1)


def kind_for(numbers: int, rows: int | None) -> Moments:
    """How moments of N numbers are held: in so many rows; if nothing is said, whole unless N is large."""
    rows = rows or (ROWS if numbers > LARGE else numbers)
    return Sketch(rows) if rows < numbers else Whole()


def kind_of(held: jax.Array) -> Moments:
    """How an array of moments is held."""
    rows, numbers = held.shape[-2:]
    return Sketch(rows) if rows < numbers else Whole()
