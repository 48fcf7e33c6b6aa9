"""Traces with local rows, (batch, K, columns): a row per carry slot of the one unit that a parameter entry reaches.

In a segment a trace is K arrays (batch, *leaf), one per slot: XLA on a CPU would copy (batch, K, |leaf|) at every
segment, and divide for every entry of (batch, |leaf|) to find its unit. A single step moves it in place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.analysis.units import Units, to_grid
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.computed_once import fewest_parts
from deepeprop_jax.traces.block import Block, spread


def contract(block: Block, shape: tuple[int, ...], cotangent: jax.Array, trace: jax.Array) -> jax.Array:
    """``lambda . S`` summed over the batch: (batch, K, units) and (batch, K, |leaf|) to the leaf's shape."""
    batch, slots = trace.shape[:2]
    wide = spread(cotangent, block.unit)
    if batch > WRITTEN_OUT:
        return jnp.einsum("bkp,bkp->p", wide, trace).reshape(shape)
    # One pass over the trace: XLA fuses the products of a written-out sum, but not those of a reduction over examples.
    return _sum([wide[b, k].reshape(shape) * trace[b, k].reshape(shape) for k in range(slots) for b in range(batch)])


def push(units: Units, block: Block, matrix: jax.Array, trace: jax.Array) -> jax.Array:
    """``M S``, dense (batch, m, columns), for M (batch, m, n). Cost: m multiply-adds per number of the trace.

    Element by element: as a product, XLA would transpose the trace there and back.
    """
    wide = spread(to_grid(matrix, units), block.unit)
    return _sum([wide[:, :, k] * trace[:, None, k] for k in range(trace.shape[1])])


def advance(block: Block, recurrence: jax.Array, trace: jax.Array) -> jax.Array:
    """``D S``, for D (batch, K, K, units). Cost: K multiply-adds per number of the trace."""
    wide = spread(recurrence, block.unit)
    return _sum([wide[:, :, k] * trace[:, None, k] for k in range(trace.shape[1])])


def select(units: Units, block: Block, rows: np.ndarray, trace: jax.Array) -> jax.Array:
    """``push`` with a matrix that selects carry components, which many cells' outputs do: (batch, rows, columns)."""
    if block.unit is None:
        raise ValueError("select() needs the unit of each entry")
    held = jnp.asarray(thin.core(block.unit), jnp.int32)
    own = jnp.asarray(units.unit[rows], jnp.int32).reshape(-1, *(1,) * held.ndim) == held[None]
    own = jnp.broadcast_to(own, (len(rows), *block.unit.shape)).reshape(len(rows), -1)
    return jnp.where(own, trace[:, units.slot[rows]], 0)


# --- in a segment: one array per slot --------------------------------------------------------------------------------


def split(block: Block, shape: tuple[int, ...], trace: jax.Array) -> list[jax.Array]:
    """(batch, K, |leaf|) as one array (batch, *leaf) per slot."""
    return [trace[:, k].reshape(-1, *shape) for k in range(block.rows)]


def join(rows: list[jax.Array]) -> jax.Array:
    """(batch, K, |leaf|)."""
    return jnp.stack([row.reshape(row.shape[0], -1) for row in rows], axis=1)


WRITTEN_OUT = 32
"""Up to this many examples a sum over them is written out."""


def contract_split(cotangent: jax.Array, rows: list[jax.Array]) -> jax.Array:
    """``lambda . S`` of a local trace, summed over the batch: (batch, K, *leaf) and K times (batch, *leaf)."""
    if cotangent.shape[0] > WRITTEN_OUT:
        terms = [(cotangent[:, k] * row).sum(axis=0) for k, row in enumerate(rows)]
    else:
        # One pass over the trace: XLA fuses the products of a written-out sum, but not those of a sum over examples.
        terms = [cotangent[b, k] * row[b] for k, row in enumerate(rows) for b in range(cotangent.shape[0])]
    return functools.reduce(jnp.add, terms).ravel()


def advance_split(row: jax.Array, trace: list[jax.Array], added: jax.Array | None) -> jax.Array:
    """One slot's trace: a row of the product of all D, (batch, K, *leaf), times all slots, and what is new."""
    terms = [row[:, k] * old for k, old in enumerate(trace)]
    return _sum(terms if added is None else [*terms, added])


# --- in a single step: in place --------------------------------------------------------------------------------------


class Outer(NamedTuple):
    """``left (x) right`` per example and slot: (batch, K or 1, rows) and (batch, K or 1, columns)."""

    left: jax.Array
    right: jax.Array


def advance_in_place(
    block: Block, shape: tuple[int, ...], recurrence: jax.Array, addition: Outer | jax.Array, trace: jax.Array
) -> jax.Array:
    """``D S + dF/dtheta`` of one leaf, (batch, K, |leaf|)."""
    found = _unit_axis(block, shape)
    if isinstance(addition, Outer):
        if found is not None and shape[0] > 1 and trace.size > _IN_ONE_PIECE:
            # The carry may have other units too: of leaves of another shape, or of other parts of a weight.
            axis, first = found
            own = lax.slice_in_dim(recurrence, first, first + shape[axis], axis=-1)
            return _by_parts((shape[0], shape[1]), axis, own, addition, trace)
        addition = (addition.left[..., :, None] * addition.right[..., None, :]).reshape(trace.shape)
    wide = spread(recurrence, block.unit)
    rows = [_sum([wide[:, r, k] * trace[:, k] for k in range(block.rows)]) for r in range(block.rows)]
    return jnp.stack(rows, axis=1) + addition


_IN_ONE_PIECE = 2**9
"""Up to this many numbers a trace is moved without a loop, which is as fast and compiles in a fraction of the time."""


def _unit_axis(block: Block, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axis of a matrix along which its entries reach units in turn, and the first of them; None if neither."""
    if len(shape) != 2 or block.unit is None:
        return None
    held = thin.core(thin.compact(block.unit.reshape(shape)))
    for axis in (1, 0):
        first = int(held.flat[0]) if held.size else 0
        if held.shape[axis] == held.size and np.array_equal(held.ravel(), np.arange(first, first + shape[axis])):
            return axis, first
    return None


def _by_parts(shape: tuple[int, int], axis: int, recurrence: jax.Array, addition: Outer, trace: jax.Array) -> jax.Array:
    """``D S + left (x) right`` of a matrix, by parts of its rows in a loop.

    On a CPU, XLA runs over (batch, K, |leaf|) with a division per entry, eight times slower than over rows and columns,
    unless the result is handed on as a matrix: to the next turn of a loop. And what a loop reads is computed before it,
    not anew for every entry.
    """
    (batch, slots), (rows, columns) = trace.shape[:2], shape
    # Around an axis of one slot XLA would lay a matrix out anew, and copy the trace: there the parts are single rows.
    by_row = slots == 1 and batch > 1
    parts = rows if by_row else fewest_parts(rows)
    size = rows // parts
    held = trace if by_row else trace.reshape(batch, slots, rows, columns)
    axis_of_parts, step = (-1, columns) if by_row else (-2, size)

    def at(x: jax.Array, part: jax.Array) -> jax.Array:
        """The part's rows of x, (..., size, 1), without the last axis where a row stands alone."""
        piece = lax.dynamic_slice_in_dim(x, part * size, size, axis=-1, allow_negative_indices=False)
        return piece if by_row else piece[..., None]

    def across(x: jax.Array) -> jax.Array:
        return x if by_row else x[..., None, :]

    def body(part: jax.Array, held: jax.Array) -> jax.Array:
        old = lax.dynamic_slice_in_dim(held, part * step, step, axis_of_parts, allow_negative_indices=False)
        wide = across(recurrence) if axis == 1 else at(recurrence, part)
        terms = [wide[:, :, k] * old[:, k : k + 1] for k in range(slots)]
        new = _sum([*terms, at(addition.left, part) * across(addition.right)])
        return lax.dynamic_update_slice_in_dim(held, new, part * step, axis_of_parts, allow_negative_indices=False)

    return lax.fori_loop(0, parts, body, held).reshape(trace.shape)


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)
