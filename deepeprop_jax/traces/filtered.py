"""The influence of a node on another that only filters its output: a row per constant of the filter, none per unit.

    S^{w,v}_t = κ ∘ S^{w,v}_{t-1} + W Y^{v,v}_t   =   W F_t,        F_t = κ F_{t-1} + Y^{v,v}_t

W does not change while F is gathered, and an entry of θ^v reaches one unit of v, which one output shows: so F has one
number for an entry, for each of the G distinct constants in κ. What is held is F; W is that of the parameters given
with a gradient. After an update of W it is as if W had always been as it is now.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.traces import local
from deepeprop_jax.traces.block import Block, over_leaf
from deepeprop_jax.traces.plan import Filter


def contract(node: Node, kind: Filter, signal: jax.Array, trace: tuple[list[jax.Array], ...]) -> dict[int, jax.Array]:
    """``(λ W) · F``, summed over the batch, per parameter leaf, flat.

    Args:
      node: the source.
      signal: (G, batch, outputs of the source): λ W of each constant's numbers.
      trace: F as ``state.split_slots`` gives it: per block and constant (batch, *leaf).
    """
    by_unit = jnp.moveaxis(jnp.where(kind.shown >= 0, signal[..., kind.shown], 0), 0, 1)
    return {
        block.leaves[0]: local.contract_split(over_leaf(by_unit, block, node.params.shapes[block.leaves[0]]), rows)
        for block, rows in zip(kind.blocks, trace, strict=True)
    }


def moved(
    block: Block,
    decays: list[jax.Array],
    shown: list[jax.Array],
    own: list[jax.Array],
    added: list[jax.Array | None],
    trace: list[jax.Array],
) -> list[jax.Array]:
    """F of one leaf later on: ``κ^C F + (what is shown of the source's trace) + added``, all per constant.

    Args:
      decays: (batch,) κ^C.
      shown: (batch, K, units), of each slot of the source's own trace.
      own: that trace, (batch, *leaf) per slot; none for a source without a carry.
      added: (batch, *leaf); None for nothing.
      trace: F, (batch, *leaf).
    """
    new = []
    for decay, now, more, old in zip(decays, shown, added, trace, strict=True):
        kept = decay.reshape(-1, *(1,) * (old.ndim - 1)) * old
        kept = kept if more is None else kept + more
        new.append(local.advance_split(over_leaf(now, block, old.shape[1:]), own, kept) if own else kept)
    return new
