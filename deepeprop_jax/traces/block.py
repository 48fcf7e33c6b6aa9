"""Columns of an influence S = dh/dtheta that are held in one array, and how they are held.

Columns are parameter entries. Rows are the n components of the carry (dense.py), or, where each entry reaches one unit,
only the K carry slots of that unit (local.py).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import numpy as np

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
