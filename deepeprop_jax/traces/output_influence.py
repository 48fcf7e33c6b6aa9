"""What an output owes to a node's parameters, Y = dy/dtheta, (batch, outputs, columns), as a sum of products.

A node's own influence has few rows where each parameter reaches one unit; on an output it has a row for each. So
``dg/dh_t S`` is kept as the two factors while it goes through layers, ``M (dg/dh_t S) = (M dg/dh_t) S``, and is
multiplied out, at one multiply-add per row, slot and column, only where a trace adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.traces.block import Block
from deepeprop_jax.traces.kinds import push, select_rows


class Factored(NamedTuple):
    """``M S``, in the columns of one block.

    Attributes:
      block: of the own trace of the source.
      matrix: M, (batch, outputs, n of the source), or (outputs,), which components of the carry the outputs are.
      trace: S, (batch, rows, columns of the block).
    """

    block: Block
    matrix: jax.Array | np.ndarray
    trace: jax.Array


class Influence(NamedTuple):
    """Y of one source, the sum of all parts.

    Attributes:
      source: the node whose parameters the columns are.
      trained: indices of its trained real parameter leaves, in the order of the columns.
      products: parts that are not multiplied out.
      leaves: per leaf index, a part that is, (batch, outputs, columns of the leaf).
      whole: a part in all columns; None for none.
    """

    source: Node
    trained: tuple[int, ...]
    products: tuple[Factored, ...] = ()
    leaves: Mapping[int, jax.Array] = MappingProxyType({})
    whole: jax.Array | None = None

    def map(self, linear: Callable[[jax.Array], jax.Array]) -> Influence:
        """Y through a map that is linear in the outputs, ``(batch, outputs, any) -> (batch, others, any)``."""
        return self._replace(
            products=tuple(part._replace(matrix=linear(self._matrix(part))) for part in self.products),
            leaves={i: linear(part) for i, part in self.leaves.items()},
            whole=None if self.whole is None else linear(self.whole),
        )

    def through(self, matrix: jax.Array) -> Influence:
        """``M Y``, with M (batch, others, outputs)."""
        found = self.map(lambda part: jnp.einsum("bmn,bnp->bmp", matrix, part))
        products = zip(self.products, found.products, strict=True)
        placed = [
            new._replace(matrix=_place(matrix, old.matrix, self.source.carry.size)) if _selects(old) else new
            for old, new in products
        ]
        return found._replace(products=tuple(placed))

    def _matrix(self, part: Factored) -> jax.Array:
        if not _selects(part):
            return jnp.asarray(part.matrix)
        selection = jnp.eye(self.source.carry.size, dtype=part.trace.dtype)[part.matrix]
        return jnp.broadcast_to(selection, (part.trace.shape[0], *selection.shape))

    def plus(self, other: Influence) -> Influence:
        """The sum of two influences of one source on one output."""
        leaves = dict(self.leaves)
        for i, part in other.leaves.items():
            leaves[i] = leaves[i] + part if i in leaves else part
        whole = other.whole
        if self.whole is not None:
            whole = self.whole if whole is None else self.whole + whole
        return Influence(self.source, self.trained, self.products + other.products, leaves, whole)

    def multiplied_out(self, batch: int, outputs: int, dtype: jnp.dtype) -> jax.Array:
        """(batch, outputs, columns)."""
        view, leaves, whole = self.source.params, dict(self.leaves), self.whole
        for block, matrix, trace in self.products:
            times = select_rows if isinstance(matrix, np.ndarray) else push
            columns = times(self.source, block, matrix, trace)
            if block.leaves != self.trained:
                add_leaves(view, block, columns, leaves)
            else:
                whole = columns if whole is None else whole + columns
        if not leaves and whole is not None:
            return whole
        parts = [leaves.get(i, jnp.zeros((batch, outputs, view.sizes[i]), dtype)) for i in self.trained]
        columns = jnp.concatenate(parts, axis=-1) if parts else jnp.zeros((batch, outputs, 0), dtype)
        return columns if whole is None else columns + whole


def add_leaves(view: RealView, block: Block, columns: jax.Array, leaves: dict[int, jax.Array]) -> None:
    """Add the columns of a block to the parts of the leaves that they belong to."""
    start = 0
    for i in block.leaves:
        part = columns[..., start : start + view.sizes[i]]
        leaves[i] = leaves[i] + part if i in leaves else part
        start += view.sizes[i]


def _selects(part: Factored) -> bool:
    return isinstance(part.matrix, np.ndarray)


def _place(matrix: jax.Array, rows: np.ndarray, n: int) -> jax.Array:
    """M times a selection of carry components: (batch, m, outputs) in their columns, (batch, m, n)."""
    if np.array_equal(rows, np.arange(rows[0], rows[0] + rows.size)):
        return jnp.pad(matrix, ((0, 0), (0, 0), (rows[0], n - rows[0] - rows.size)))
    return matrix @ jnp.eye(n, dtype=matrix.dtype)[rows]
