"""Columns of an influence S = dh/dtheta that are held in one array, and a value per unit given to them.

Columns are parameter entries. Rows are the n components of the carry (dense.py), or, where each entry reaches one unit,
only the K carry slots of that unit (local.py).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.real_leaves import RealView


class Rows(enum.Enum):
    """What the rows of an influence are."""

    LOCAL = "local"
    """The carry slots of the one unit that an entry reaches."""
    DENSE = "dense"
    """All components of the carry."""


class Block(NamedTuple):
    """Columns that are held in one array.

    Attributes:
      kind: what its rows are.
      leaves: indices of the real parameter leaves whose entries are the columns, in order.
      unit: the unit that each entry reaches, where local: the columns are its entries in order. In the leaf's shape
        where it is one leaf, with stride 0 along axes along which it does not change.
      rows: number of rows.
      columns: number of columns.
    """

    kind: Rows
    leaves: tuple[int, ...]
    unit: np.ndarray | None
    rows: int
    columns: int


def add_columns(view: RealView, grads: list[jax.Array], leaves: tuple[int, ...], columns: jax.Array) -> None:
    """Add contracted columns, (..., columns), to the gradients of the real parameter leaves that they belong to."""
    start = 0
    for i in leaves:
        grads[i] = grads[i] + columns[..., start : start + view.sizes[i]].reshape(grads[i].shape)
        start += view.sizes[i]


# --- a value per unit, given to every parameter entry that reaches the unit ----------------------------------------


class Order(enum.Enum):
    """How the entries of a leaf run through their units."""

    OVER_AND_OVER = "over and over"
    EACH_SEVERAL_TIMES = "each several times"
    ANY = "any"


def spread(values: jax.Array, unit: np.ndarray | None) -> jax.Array:
    """``values[..., unit.ravel()]``: a value per unit, given to each parameter entry that reaches it.

    Weights run through their units in order, over and over or each several times; that is a broadcast, where a gather
    of the size of the weights would be slow on a CPU.
    """
    if unit is None or unit.size == 0:
        raise ValueError("spread() needs the unit of each entry")
    order, held = order_of(unit), thin.core(thin.compact(unit))
    if order is Order.ANY:
        lead = values.shape[:-1]
        return jnp.broadcast_to(values[..., held], (*lead, *unit.shape)).reshape(*lead, unit.size)
    start, distinct = range_of(held)
    used = lax.slice_in_dim(values, start, start + distinct, axis=values.ndim - 1)
    lead, repeats = used.shape[:-1], unit.size // distinct
    if order is Order.OVER_AND_OVER:
        wide = jnp.broadcast_to(used[..., None, :], (*lead, repeats, distinct))
    else:
        wide = jnp.broadcast_to(used[..., None], (*lead, distinct, repeats))
    return wide.reshape(*lead, unit.size)


def order_of(unit: np.ndarray) -> Order:
    """How entries run through their units."""
    held = thin.core(thin.compact(unit))
    changing = [axis for axis, size in enumerate(held.shape) if size > 1]
    still = [axis for axis, size in enumerate(unit.shape) if size > 1 and axis not in changing]
    start, distinct = range_of(held)
    run, repeats = np.arange(start, start + distinct), held.size // distinct
    if np.array_equal(held.ravel(), np.tile(run, repeats)) and all(a < b for a in still for b in changing):
        return Order.OVER_AND_OVER
    several = np.array_equal(held.ravel(), np.repeat(run, repeats)) and all(a > b for a in still for b in changing)
    return Order.EACH_SEVERAL_TIMES if several else Order.ANY


def range_of(unit: np.ndarray) -> tuple[int, int]:
    """The first unit, and how many there are up to the last."""
    return int(unit.min()), int(unit.max()) - int(unit.min()) + 1


def over_leaf(values: jax.Array, block: Block, shape: tuple[int, ...]) -> jax.Array:
    """(batch, K, units) given to the entries of a leaf, (batch, K, *leaf); size 1 along axes that do not matter."""
    lead = values.shape[:-1]
    if block.unit is not None and block.unit.size:
        line = thin.core(thin.compact(block.unit.reshape(shape)))
        first = int(line.flat[0])
        if line.size in shape and np.array_equal(line.ravel(), np.arange(first, first + line.size)):
            for axis in range(len(shape)):
                if line.shape[axis] == shape[axis] == line.size:
                    used = jax.lax.slice_in_dim(values, first, first + line.size, axis=values.ndim - 1)
                    return used.reshape(*lead, *line.shape)
    return spread(values, block.unit).reshape(*lead, *shape)
