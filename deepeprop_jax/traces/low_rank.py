"""A kind of trace: of many weights together, as one product of low rank, which is moved without being multiplied out.

Where a weight's immediate influence is an outer product delta (x) z, that of all such weights of a node together is one
matrix S, per example: rows are the components of all deltas, for each carry slot; columns those of all z. Over a
segment, with D the product of the unit-local blocks and Lambda what reaches its end of each step's deltas,

    S_end = D S + sum over steps of Lambda (x) z  =:  A

is known as a product of few columns. (Of a projected carry a slot is a direction, and D mixes those.) One step of
subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4), started from what was kept of S, keeps R of its
directions: S_end ~ Q (Q^T A), with Q an orthonormal basis of A G^T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.program import Atom
from deepeprop_jax.traces.block import Block, spread

PROBES = 4
"""Random signs that S is multiplied with, exactly, to see what the product of low rank has lost."""

STRAY = 0.01
"""Random part of the iteration's start, relative to what was kept: a direction once lost is found again."""


class LowRank(NamedTuple):
    """S ~ left^T right per example, and S times fixed random signs.

    Attributes:
      left: (batch, R, K N), orthonormal rows.
      right: (batch, R, M).
      probed: (batch, PROBES, K N), the exact S times the signs.
    """

    left: jax.Array
    right: jax.Array
    probed: jax.Array


class PlaceOfLeaf(NamedTuple):
    """Where a parameter leaf lies in S.

    Attributes:
      rows, columns: the slices of N and M that its entries are.
      rows_first: whether the leaf's first axis is that of the rows.
    """

    rows: slice
    columns: slice
    rows_first: bool


class Layout(NamedTuple):
    """What the rows and columns of a node's S are.

    Attributes:
      rank: R.
      blocks: the blocks, one parameter leaf each, that S stands for.
      places: per block.
      deltas: per group of rows, the number of its variable among the program's cuts.
      factors: per group of columns, z.
      row_widths, column_widths: size of each group.
      unit: (N,) the unit of each row; None where all rows of a slot move alike.
      slots: K.
    """

    rank: int
    blocks: tuple[Block, ...]
    places: tuple[PlaceOfLeaf, ...]
    deltas: tuple[int, ...]
    factors: tuple[Atom, ...]
    row_widths: tuple[int, ...]
    column_widths: tuple[int, ...]
    unit: np.ndarray | None
    slots: int

    @property
    def rows(self) -> int:
        """N, rows of one slot."""
        return sum(self.row_widths)

    @property
    def columns(self) -> int:
        """M."""
        return sum(self.column_widths)

    def by_row(self, values: jax.Array) -> jax.Array:
        """Values (..., units) as (..., N); those of whole slots, (...), as (..., 1)."""
        return values[..., None] if self.unit is None else spread(values, self.unit)

    def shapes(self, batch: int, dtype: jnp.dtype) -> LowRank:
        """Shapes and dtypes of the state."""
        rows = self.slots * self.rows
        shapes = ((batch, self.rank, rows), (batch, self.rank, self.columns), (batch, PROBES, rows))
        return LowRank(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def advance(layout: Layout, trace: LowRank, recurrence: jax.Array, deltas: jax.Array, factors: jax.Array) -> LowRank:
    """One segment on.

    Args:
      recurrence: (batch, K, K, units) product of all D; (batch, K, K) where all rows of a slot move alike.
      deltas: (batch, C, K N), Lambda.
      factors: (batch, C, M), z.

    Cost: O(R (C + R) (K N + M)) multiply-adds per example.
    """
    rank, right = layout.rank, trace.right
    wide = layout.by_row(recurrence)
    left, probed = _through(layout, wide, trace.left), _through(layout, wide, trace.probed)
    signs, stray = _random(layout.columns, rank, right.dtype)
    start = _unit_length(_without_rounding(right)) + STRAY * stray[None]
    # What is new of A start^T, and of A times the signs.
    directions = jnp.concatenate([start, jnp.broadcast_to(signs, (len(right), *signs.shape))], axis=1)
    new = _times(deltas, _onto(factors, directions))
    basis = orthonormal(_times(left, _onto(right, start)) + new[:, :rank])
    right = _times(right, _onto(left, basis)) + _times(factors, _onto(deltas, basis))
    return LowRank(basis, right, probed + new[:, rank:])


def _onto(rows: jax.Array, directions: jax.Array) -> jax.Array:
    """(batch, any, R) the components of (batch, any, n) along (batch, R, n)."""
    return jnp.einsum("bcn,bqn->bcq", rows, directions)


def _times(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """(batch, R, n) sums of rows (batch, any, n) with weights (batch, any, R)."""
    return jnp.einsum("bcq,bcn->bqn", weights, rows)


def _through(layout: Layout, wide: jax.Array, rows: jax.Array) -> jax.Array:
    """D, (batch, K, K, N or 1), times (batch, any, K N)."""
    parts = rows.reshape(*rows.shape[:2], layout.slots, layout.rows)
    moved = sum(wide[:, None, :, k] * parts[:, :, None, k] for k in range(layout.slots))
    return moved.reshape(rows.shape)


def contract(layout: Layout, trace: LowRank, cotangent: jax.Array) -> list[jax.Array]:
    """``lambda . S`` summed over the batch, per block in the leaf's shape.

    Args:
      cotangent: (batch, K, units); (batch, K) where all rows of a slot move alike.
    """
    wide = layout.by_row(cotangent)[:, None]
    parts = trace.left.reshape(*trace.left.shape[:2], layout.slots, layout.rows)
    rows = (wide * parts).sum(axis=2)  # (batch, R, N)
    found = []
    for place in layout.places:
        pair = rows[..., place.rows], trace.right[..., place.columns]
        found.append(jnp.einsum("bri,brj->ij", *(pair if place.rows_first else pair[::-1])))
    return found


def multiplied_out(layout: Layout, trace: LowRank) -> list[jax.Array]:
    """Per block S as the trace of its leaf, (batch, K, |leaf|)."""
    parts = trace.left.reshape(*trace.left.shape[:2], layout.slots, layout.rows)
    found = []
    for place in layout.places:
        order = "bkij" if place.rows_first else "bkji"
        leaf = jnp.einsum(f"brki,brj->{order}", parts[..., place.rows], trace.right[..., place.columns])
        found.append(leaf.reshape(*leaf.shape[:2], -1))
    return found


def relative_error(trace: LowRank) -> jax.Array:
    """An estimate of ‖S - S_R‖ / ‖S‖ in the Frobenius norm, (batch,) or (L, batch)."""
    if trace.left.ndim == 4:  # of several layers
        return jax.vmap(relative_error)(trace)
    signs, _ = _random(trace.right.shape[-1], trace.left.shape[1], trace.right.dtype)
    lost = trace.probed - jnp.einsum("brn,brp->bpn", trace.left, jnp.einsum("brm,pm->brp", trace.right, signs))
    norms = [jnp.sqrt(jnp.square(x).sum(axis=(1, 2))) for x in (lost, trace.probed)]
    return jnp.where(norms[1] > 0, norms[0] / jnp.where(norms[1] > 0, norms[1], 1), 0)


def _random(columns: int, rank: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Signs (PROBES, M), and rows (R, M) of about unit length; the same ones whenever asked for."""
    numbers = np.random.default_rng(0)
    signs = numbers.choice([-1.0, 1.0], (PROBES, columns))
    return jnp.asarray(signs, dtype), jnp.asarray(numbers.normal(size=(rank, columns)) / np.sqrt(columns), dtype)


def _without_rounding(rows: jax.Array) -> jax.Array:
    """Rows that are only what rounding has left, where the trace has fewer directions than R, as zero."""
    sizes = _norm(rows)
    return jnp.where(sizes > 64 * jnp.finfo(rows.dtype).eps * sizes.max(axis=1, keepdims=True), rows, 0)


def _unit_length(rows: jax.Array) -> jax.Array:
    """Rows over their norms, through their largest entry: squares of small numbers are none. Zero rows stay."""
    rows = _over(rows, jnp.abs(rows).max(axis=-1, keepdims=True))
    return _over(rows, _norm(rows))


def _over(rows: jax.Array, size: jax.Array) -> jax.Array:
    return rows / jnp.where(size > 0, size, 1)


def _norm(rows: jax.Array) -> jax.Array:
    """Of each row; of a zero row 0, and so is its derivative."""
    squares = jnp.square(rows).sum(axis=-1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def orthonormal(rows: jax.Array) -> jax.Array:
    """Gram-Schmidt, each row twice, which is enough (Giraud et al. 2005), over (batch, R, any).

    A row that depends on those before it becomes a direction that rounding chose, or zero where there is none left.
    """

    def body(index: jax.Array, basis: jax.Array) -> jax.Array:
        def outside(row: jax.Array) -> jax.Array:
            inside = jnp.einsum("bn,brn->br", row, basis, precision=lax.Precision.HIGHEST)
            return row - jnp.einsum("br,brn->bn", inside, basis, precision=lax.Precision.HIGHEST)

        once = outside(lax.dynamic_index_in_dim(rows, index, axis=1, keepdims=False))
        twice = outside(_over(once, _norm(once)))
        size = _norm(twice)
        row = jnp.where(size > 0.5, _over(twice, size), 0)
        return lax.dynamic_update_index_in_dim(basis, row, index, axis=1)

    rows = _unit_length(rows)
    return lax.fori_loop(0, rows.shape[1], body, vary_like(jnp.zeros_like(rows), rows))
