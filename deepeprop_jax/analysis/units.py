"""The units of a carry: one index of it, with a slot for each leaf of one shape."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.real_leaves import RealView


class Units(NamedTuple):
    """The units of a carry: leaves of one shape share their units, one slot each.

    Attributes:
      slot: (n,) for each carry component its slot.
      unit: (n,) for each carry component its unit.
      grid: (slots, units) the carry component at a slot of a unit; n where a unit has fewer slots.
    """

    slot: np.ndarray
    unit: np.ndarray
    grid: np.ndarray

    @property
    def slots(self) -> int:
        """K, the number of carry slots of a unit."""
        return self.grid.shape[0]


def units_of(carry: RealView) -> Units:
    """Group the carry's components into units."""
    first: dict[tuple[int, ...], int] = {}
    used: dict[tuple[int, ...], int] = {}
    slot: list[int] = []
    unit: list[int] = []
    for shape, size in zip(carry.shapes, carry.sizes, strict=True):
        start = first.setdefault(shape, sum(int(np.prod(known, dtype=int)) for known in first))
        slot += [used.get(shape, 0)] * size
        unit += range(start, start + size)
        used[shape] = used.get(shape, 0) + 1
    grid = np.full((max(slot, default=-1) + 1, max(unit, default=-1) + 1), carry.size)
    grid[slot, unit] = np.arange(carry.size)
    return Units(np.array(slot, int), np.array(unit, int), grid)


def unit_numbers(units: Units, carry: RealView) -> list[np.ndarray]:
    """For each real carry leaf, in its shape, the unit of each component."""
    ends = np.cumsum([0, *carry.sizes])
    return [units.unit[ends[i] : ends[i + 1]].reshape(shape) for i, shape in enumerate(carry.shapes)]


def to_grid(values: jax.Array, units: Units, axis: int = -1) -> jax.Array:
    """Carry components along ``axis`` as two axes (slots, units), zero where a unit has fewer slots."""
    axis %= values.ndim
    shape = values.shape
    if np.array_equal(units.grid.ravel(), np.arange(len(units.slot))):
        return values.reshape(*shape[:axis], *units.grid.shape, *shape[axis + 1 :])
    zero = jnp.zeros((*shape[:axis], 1, *shape[axis + 1 :]), values.dtype)
    return jnp.take(jnp.concatenate([values, zero], axis=axis), units.grid, axis=axis)


def from_grid(grid: jax.Array, units: Units, axis: int = -1) -> jax.Array:
    """The inverse of ``to_grid``; ``axis`` is that of the carry components in what is returned."""
    axis %= grid.ndim - 1
    shape = grid.shape
    flat = grid.reshape(*shape[:axis], units.grid.size, *shape[axis + 2 :])
    if np.array_equal(units.grid.ravel(), np.arange(len(units.slot))):
        return flat
    return jnp.take(flat, units.slot * units.grid.shape[1] + units.unit, axis=axis)
