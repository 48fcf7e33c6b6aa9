"""The operations on a node's own trace, (batch, rows, columns), of either kind of rows."""

from __future__ import annotations

import jax
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.traces import dense, local
from deepeprop_jax.traces.block import Block, Rows


def push(node: Node, block: Block, matrix: jax.Array, trace: jax.Array) -> jax.Array:
    """``M S``, dense (batch, m, columns), for M (batch, m, n)."""
    return dense.push(matrix, trace) if block.kind is Rows.DENSE else local.push(node.units, block, matrix, trace)


def select_rows(node: Node, block: Block, rows: np.ndarray, trace: jax.Array) -> jax.Array:
    """``push`` with a matrix that selects carry components, which many cells' outputs do: (batch, rows, columns)."""
    return trace[:, rows] if block.kind is Rows.DENSE else local.select(node.units, block, rows, trace)


def advance(node: Node, block: Block, recurrence: jax.Array, trace: jax.Array) -> jax.Array:
    """``dF/dh S``: one step on.

    Args:
      recurrence: unit-local blocks (batch, K, K, units), or the full Jacobian (batch, n, n).
    """
    if block.kind is Rows.LOCAL:
        return local.advance(block, recurrence, trace)
    return dense.push(recurrence, trace) if recurrence.ndim == 3 else dense.advance(node.units, recurrence, trace)
