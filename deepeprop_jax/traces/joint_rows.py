"""All local blocks of a node's trace as one: what costs a loop over the weights then costs one, not one per leaf."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr import thin
from deepeprop_jax.traces.block import Block, Order, Rows, order_of, range_of


class Joint(NamedTuple):
    """Blocks of which all local ones are one, where its entries run through their units over and over still.

    Attributes:
      blocks: the joint ones.
      members: per joint block, the places of those that it is made of.
    """

    blocks: tuple[Block, ...]
    members: tuple[tuple[int, ...], ...]

    def join(self, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Arrays (..., columns) of the blocks as those of the joint ones."""
        return tuple(jnp.concatenate([arrays[i] for i in places], axis=-1) for places in self.members)

    def split(self, arrays: tuple[jax.Array, ...], blocks: tuple[Block, ...]) -> tuple[jax.Array, ...]:
        """The inverse of ``join``."""
        found: dict[int, jax.Array] = {}
        for array, places in zip(arrays, self.members, strict=True):
            ends = np.cumsum([blocks[i].columns for i in places])[:-1]
            found |= dict(zip(places, jnp.split(array, ends, axis=-1), strict=True))
        return tuple(found[i] for i in range(len(blocks)))


def joint(blocks: tuple[Block, ...]) -> Joint:
    """See ``Joint``: what costs a loop over the weights then costs one, not one per parameter leaf."""
    local = tuple(i for i, block in enumerate(blocks) if block.unit is not None)
    unit = _over_and_over([block.unit for block in blocks if block.unit is not None])
    if len(local) < 2 or unit is None:
        return Joint(blocks, tuple((i,) for i in range(len(blocks))))
    leaves = tuple(leaf for i in local for leaf in blocks[i].leaves)
    one = Block(Rows.LOCAL, leaves, unit, blocks[local[0]].rows, unit.size)
    others = tuple(i for i in range(len(blocks)) if i not in local)
    return Joint((one, *(blocks[i] for i in others)), (local, *((i,) for i in others)))


def _over_and_over(units: list[np.ndarray]) -> np.ndarray | None:
    """Units one after the other, (times, distinct), if they run through all of theirs in order over and over."""
    ranges = [range_of(thin.core(unit)) for unit in units if unit.size]
    start = min((first for first, _ in ranges), default=0)
    distinct = max((first + count for first, count in ranges), default=0) - start
    place = 0
    for unit, (first, count) in zip([unit for unit in units if unit.size], ranges, strict=True):
        in_turn = count in (distinct, unit.size) and order_of(unit) is Order.OVER_AND_OVER
        if not in_turn or (place - (first - start)) % distinct:
            return None
        place += unit.size
    if not place or place % distinct:
        return None
    return np.broadcast_to(np.arange(start, start + distinct), (place // distinct, distinct))
