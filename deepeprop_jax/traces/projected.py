"""The projected carry: the influence of all parameters on all carries, kept along R directions of the carry.

    S  ≈  A V,    V = Uᵀ S        S: N x |theta|,  U and A: N x R,  V: R x |theta| for every example

N counts the real numbers of all carries together. What a cotangent λ of the carries owes to a parameter is λ · S, and
(λ · A) V of it is kept: all of it where λ lies in the span of U and Uᵀ A = 1. The columns of U are called directions,
those of A the lift. Both are the same for all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.traces.low_rank import Layout, LowRank

NAME = "projected carry"
"""The key of V in the state's traces."""

_WRITTEN_OUT = 16
"""Up to so many directions V M is a sum of products, which XLA fuses with what is added to it."""

Columns = dict[str, list[jax.Array]]
"""V by the name of the node whose parameters they are: per trained real leaf (batch, R, [layers,] ...)."""


class Projection(NamedTuple):
    """What a projected carry is of.

    Attributes:
      rank: R.
      every: once in how many single steps it is projected.
      sources: the nodes whose parameters have an influence on a carry.
      starts: per node, where the numbers of its carry start among all N; N at the end.
      factor: q, the rank of those products; None without any.
      layouts: per node, the weights whose part of V is one product of low rank; None where there are none.
    """

    rank: int
    every: int
    sources: tuple[int, ...]
    starts: tuple[int, ...]
    factor: int | None
    layouts: tuple[Layout | None, ...]

    @property
    def numbers(self) -> int:
        """N."""
        return self.starts[-1]

    def of_node(self, v: int, rows: jax.Array) -> jax.Array:
        """What of rows (..., N) belongs to node v's carry."""
        return rows[..., self.starts[v] : self.starts[v + 1]]

    def whole(self, k: int, leaves: Sequence[int]) -> list[int]:
        """Those of node k's leaves that are not of low rank."""
        layout = self.layouts[k]
        factored = set() if layout is None else {i for block in layout.blocks for i in block.leaves}
        return [i for i in leaves if i not in factored]


class ProjectedCarry(NamedTuple):
    """A projected carry, and the basis that it is kept in.

    Attributes:
      columns: V, without what is of low rank.
      factored: that, by the name of the node whose parameters they are.
      held: (R, N) the lift that belongs to ``columns``: that of the basis with which they were made.
      directions, lift: (R, N) Uᵀ and Aᵀ, the basis from now on.
    """

    columns: Columns
    factored: dict[str, LowRank]
    held: jax.Array
    directions: jax.Array
    lift: jax.Array

    def in_basis_of(self, other: ProjectedCarry, moved: jax.Array | bool) -> ProjectedCarry:
        """The same columns, with the basis of ``other``, from which they came; ``moved`` if through a projection.

        Over a mesh it is the same on all devices, and known as such.
        """
        held = other.lift if moved is True else jnp.where(moved, other.lift, other.held)
        return ProjectedCarry(self.columns, self.factored, held, other.directions, other.lift)


def contract(along: jax.Array, columns: jax.Array) -> jax.Array:
    """``(λ A) V`` of one leaf, summed over the batch.

    Args:
      along: λ A, (batch, R).
      columns: (batch, R, ...).
    """
    return jnp.einsum("br,br...->...", along, columns)


def advance(mixing: jax.Array, columns: jax.Array, added: jax.Array | None) -> jax.Array:
    """``V <- (Uᵀ M A) V + Uᵀ G`` of one leaf.

    Args:
      mixing: Uᵀ M A, (batch, R, R).
      columns: (batch, R, ...).
      added: Uᵀ G, of the same shape; None for zero.
    """
    batch, rank = columns.shape[:2]
    if rank > _WRITTEN_OUT:
        moved = jnp.einsum("bij,bj...->bi...", mixing, columns)
    else:
        wide = mixing.reshape(batch, rank, *(1,) * (columns.ndim - 2), rank)
        moved = sum(wide[..., j] * columns[:, j][:, None] for j in range(rank))
    return moved if added is None else moved + added


def select(where: jax.Array, held: ProjectedCarry, other: ProjectedCarry) -> ProjectedCarry:
    """Per example, the columns of ``held`` where true and those of ``other``, in whose basis both are, elsewhere."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(where.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    columns, factored = jax.tree.map(choose, held[:2], other[:2])
    return other._replace(columns=columns, factored=factored)


def without_examples(where: jax.Array, held: ProjectedCarry) -> ProjectedCarry:
    """Zero for some examples: (batch,)."""
    columns, factored = jax.tree.map(jnp.zeros_like, held[:2])
    return select(where, held._replace(columns=columns, factored=factored), held)


def random_basis(key: jax.Array, rank: int, numbers: int, dtype: np.dtype) -> jax.Array:
    """R orthonormal directions of N numbers, (R, N)."""
    return jnp.linalg.qr(jax.random.normal(key, (numbers, rank), dtype))[0].T
