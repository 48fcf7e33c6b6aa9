"""The one kind of trace: an influence S = dh/dtheta held as an array (batch, rows, columns), and its three operations.

Columns are parameter entries. Rows are the n components of the carry ("dense"), or, where each entry reaches one unit,
only the K carry slots of that unit ("local").
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.node import Node, from_grid, to_grid
from deepeprop_jax.real import RealView


class Block(NamedTuple):
    """Columns that are held in one array.

    Attributes:
      kind: "local" or "dense".
      leaves: indices of the real parameter leaves whose entries are the columns, in order.
      unit: (columns,) the unit that each entry reaches, where local.
      rows: number of rows.
      columns: number of columns.
    """

    kind: str
    leaves: tuple[int, ...]
    unit: np.ndarray | None
    rows: int
    columns: int


def contract(node: Node, block: Block, cotangent: jax.Array, trace: jax.Array) -> jax.Array:
    """``lambda . S``, summed over the batch.

    Args:
      cotangent: (batch, n) cotangent of the carry.
      trace: (batch, rows, columns).

    Returns:
      (columns,) contribution to the gradient. Cost: one read of the trace.
    """
    if block.kind == "dense":
        return jnp.einsum("bn,bnp->p", cotangent, trace)
    return jnp.einsum("bkp,bkp->p", spread(to_grid(cotangent, node.units), block.unit), trace)


def add_columns(view: RealView, grads: list[jax.Array], leaves: tuple[int, ...], columns: jax.Array) -> None:
    """Add contracted columns, (..., columns), to the gradients of the real parameter leaves that they belong to."""
    start = 0
    for i in leaves:
        grads[i] = grads[i] + columns[..., start : start + view.sizes[i]].reshape(grads[i].shape)
        start += view.sizes[i]


def push(node: Node, block: Block, matrix: jax.Array, trace: jax.Array) -> jax.Array:
    """``M S``: an influence on the carry turned into one on what M maps the carry to.

    Args:
      matrix: (batch, m, n).
      trace: (batch, rows, columns).

    Returns:
      (batch, m, columns), dense.
    """
    if block.kind == "dense":
        return jnp.einsum("bmn,bnp->bmp", matrix, trace)
    return _sum_over_slots(spread(to_grid(matrix, node.units), block.unit), trace)


def advance(node: Node, block: Block, recurrence: jax.Array, trace: jax.Array) -> jax.Array:
    """``dh_t/dh_tm1 S``: one step to the right on the lattice.

    Args:
      recurrence: unit-local blocks (batch, K, K, units), or the full Jacobian (batch, n, n).
      trace: (batch, rows, columns).

    Returns:
      (batch, rows, columns). Cost per column: K^2 (local), K n (dense rows, local blocks) or n^2 (full Jacobian).
    """
    if recurrence.ndim == 3:
        return jnp.einsum("bmn,bnp->bmp", recurrence, trace)
    if block.kind == "local":
        return _sum_over_slots(spread(recurrence, block.unit), trace)
    by_unit = to_grid(trace, node.units, axis=1)  # (batch, K, units, columns)
    return from_grid(_sum_over_slots(recurrence[..., None], by_unit), node.units, axis=1)


def _sum_over_slots(matrix: jax.Array, trace: jax.Array) -> jax.Array:
    """``sum_k M[:, m, k] S[:, k]``, element by element: as a product, XLA would transpose the trace there and back."""
    return functools.reduce(jnp.add, [matrix[:, :, k] * trace[:, None, k] for k in range(trace.shape[1])])


def spread(values: jax.Array, unit: np.ndarray | None) -> jax.Array:
    """``values[..., unit]``: a value per unit, given to each parameter entry that reaches it.

    Weights run through their units in order, over and over or each several times; that is a broadcast, where a gather
    of the size of the weights would be slow on a CPU.
    """
    if unit is None or unit.size == 0:
        raise ValueError("spread() needs the unit of each entry")
    distinct = int(unit.max()) - int(unit.min()) + 1
    start, repeats = int(unit.min()), unit.size // distinct
    if repeats * distinct == unit.size:
        run = np.arange(start, start + distinct)
        used = jax.lax.slice_in_dim(values, start, start + distinct, axis=values.ndim - 1)
        if np.array_equal(unit, np.tile(run, repeats)):
            wide = jnp.broadcast_to(used[..., None, :], (*used.shape[:-1], repeats, distinct))
            return wide.reshape(*used.shape[:-1], unit.size)
        if np.array_equal(unit, np.repeat(run, repeats)):
            wide = jnp.broadcast_to(used[..., None], (*used.shape, repeats))
            return wide.reshape(*used.shape[:-1], unit.size)
    return values[..., unit]


def select_rows(node: Node, block: Block, rows: np.ndarray, trace: jax.Array) -> jax.Array:
    """``push`` with a matrix that selects carry components, which many cells' outputs do: (batch, rows, columns)."""
    if block.kind == "dense":
        return trace[:, rows]
    own = jnp.asarray(node.units.unit[rows])[:, None] == jnp.asarray(block.unit)[None]
    return jnp.where(own, trace[:, node.units.slot[rows]], 0)
