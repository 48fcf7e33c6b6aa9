"""The influence of a node on another that only filters its output: a row per constant of the filter, none per unit.

    S^{w,v}_t = κ ∘ S^{w,v}_{t-1} + W Y^{v,v}_t   =   W F_t,        F_t = κ F_{t-1} + Y^{v,v}_t

W does not change while F is gathered, and an entry of θ^v reaches one unit of v, which one output shows: so F has one
number for an entry, for each of the G distinct constants in κ. What is held is F; W is that of the parameters given
with a gradient. After an update of W it is as if W had always been as it is now.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.traces.block import Block, over_leaf


class Filter(NamedTuple):
    """How one node filters the output of another.

    Attributes:
      decays: (G,) its distinct constants.
      group: (n,) which of them each number of its carry has.
      shown: (units of the node below,) the number of the output that shows a unit, -1 for none.
    """

    decays: np.ndarray
    group: np.ndarray
    shown: np.ndarray


def contract(
    node: Node, blocks: tuple[Block, ...], trained: tuple[int, ...], kind: Filter, signal: jax.Array, trace: jax.Array
) -> jax.Array:
    """``(λ W) · F``, summed over the batch, (columns,).

    Args:
      node: the source.
      blocks: its own, all local.
      signal: (G, batch, outputs of the source): λ W of each constant's numbers.
      trace: F, (batch, G, columns).
    """
    by_unit = jnp.where(kind.shown >= 0, signal[..., kind.shown], 0)
    known, parts, start = {block.leaves[0]: block for block in blocks}, [], 0
    for i in trained:
        size, shape = node.params.sizes[i], node.params.shapes[i]
        rows = trace[..., start : start + size]
        start += size
        if i not in known:
            parts.append(jnp.zeros(size, trace.dtype))
            continue
        wide = over_leaf(jnp.moveaxis(by_unit, 0, 1), known[i], shape)  # (batch, G, *leaf)
        parts.append((wide * rows.reshape(*rows.shape[:2], *shape)).sum((0, 1)).ravel())
    return jnp.concatenate(parts)
