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
from jax import lax

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.analysis.units import from_grid, to_grid
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import PyTree, RealView


class Block(NamedTuple):
    """Columns that are held in one array.

    Attributes:
      kind: "local" or "dense".
      leaves: indices of the real parameter leaves whose entries are the columns, in order.
      unit: the unit that each entry reaches, where local: the columns are its entries in order. In the leaf's shape
        where it is one leaf, with stride 0 along axes along which it does not change.
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
    """``values[..., unit.ravel()]``: a value per unit, given to each parameter entry that reaches it.

    Weights run through their units in order, over and over or each several times; that is a broadcast, where a gather
    of the size of the weights would be slow on a CPU.
    """
    if unit is None or unit.size == 0:
        raise ValueError("spread() needs the unit of each entry")
    order, held = _order(unit), thin.core(thin.compact(unit))
    if order == "any":
        lead = values.shape[:-1]
        return jnp.broadcast_to(values[..., held], (*lead, *unit.shape)).reshape(*lead, unit.size)
    start, distinct = _range(held)
    used = lax.slice_in_dim(values, start, start + distinct, axis=values.ndim - 1)
    lead, repeats = used.shape[:-1], unit.size // distinct
    if order == "over and over":
        wide = jnp.broadcast_to(used[..., None, :], (*lead, repeats, distinct))
    else:
        wide = jnp.broadcast_to(used[..., None], (*lead, distinct, repeats))
    return wide.reshape(*lead, unit.size)


def _order(unit: np.ndarray) -> str:
    """How entries run through their units: "over and over", "each several times" or "any"."""
    held = thin.core(thin.compact(unit))
    changing = [axis for axis, size in enumerate(held.shape) if size > 1]
    still = [axis for axis, size in enumerate(unit.shape) if size > 1 and axis not in changing]
    start, distinct = _range(held)
    run, repeats = np.arange(start, start + distinct), held.size // distinct
    if np.array_equal(held.ravel(), np.tile(run, repeats)) and all(a < b for a in still for b in changing):
        return "over and over"
    several = np.array_equal(held.ravel(), np.repeat(run, repeats)) and all(a > b for a in still for b in changing)
    return "each several times" if several else "any"


def _range(unit: np.ndarray) -> tuple[int, int]:
    """The first unit, and how many there are up to the last."""
    return int(unit.min()), int(unit.max()) - int(unit.min()) + 1


def computed_once(tree: PyTree) -> PyTree:
    """The same arrays, stored: XLA computes a cheap expression anew in all that reads it, here for every entry of the
    weights, but not what comes out of a loop."""

    def body(part: jax.Array, stored: PyTree) -> PyTree:
        def store(x: jax.Array, stored: jax.Array) -> jax.Array:
            size = x.shape[-1] // fewest_parts(x.shape[-1])
            start = part * size % x.shape[-1]
            piece = lax.dynamic_slice_in_dim(x, start, size, axis=-1, allow_negative_indices=False)
            return lax.dynamic_update_slice_in_dim(stored, piece, start, axis=-1, allow_negative_indices=False)

        return jax.tree.map(store, tree, stored)

    turns = max((fewest_parts(x.shape[-1]) for x in jax.tree.leaves(tree)), default=0)
    return lax.fori_loop(0, turns, body, vary_like(jax.tree.map(jnp.zeros_like, tree), tree))


def fewest_parts(size: int) -> int:
    """The smallest number of equal parts that is more than one; a loop of one turn XLA would dissolve."""
    return next((count for count in range(2, size + 1) if size % count == 0), 1)
