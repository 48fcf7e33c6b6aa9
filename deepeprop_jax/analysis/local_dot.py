"""A matrix product cut to the entries that stay inside one unit: element-wise products, and a sum of what is left."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.program import Equation, dot_axes, shape_of


class LocalDot(NamedTuple):
    """The entries of a dot that stay inside one unit: per output element, which products to sum.

    Attributes:
      lhs: (output size, entries) flat positions in the left operand.
      rhs: the same in the right operand.
      mask: which of them count; outputs with fewer entries are padded.
    """

    lhs: np.ndarray
    rhs: np.ndarray
    mask: np.ndarray

    def __call__(self, equation: Equation, lhs: jax.Array, rhs: jax.Array) -> list[jax.Array]:
        """The localised dot of two values."""
        output = equation.outputs[0].aval
        total = jnp.zeros(self.lhs.shape[0], output.dtype)
        for entry in range(self.lhs.shape[1]):
            product = _take(lhs, self.lhs[:, entry]) * _take(rhs, self.rhs[:, entry])
            mask = self.mask[:, entry]
            total = total + (product if mask.all() else jnp.where(mask, product, 0)).astype(output.dtype)
        return [total.reshape(output.shape)]


def _take(array: jax.Array, positions: np.ndarray) -> jax.Array:
    """``array.ravel()[positions]``; evenly spaced positions are a slice, since a gather is slow on a CPU."""
    flat = jnp.ravel(array)
    steps = np.diff(positions)
    if len(positions) > 1 and steps[0] > 0 and (steps == steps[0]).all():
        return jax.lax.slice(flat, (int(positions[0]),), (int(positions[-1]) + 1,), (int(steps[0]),))
    return flat[positions]


def local_dot(equation: Equation, side: int, units: np.ndarray, fed: np.ndarray) -> LocalDot:
    """Keep the products whose labelled factor depends on the very unit that the output element feeds.

    Args:
      side: the labelled operand.
      units: in its shape, the unit that each element depends on; -1 for none.
      fed: in the output's shape, the unit that each element feeds; -1 for none.

    Cost: of the size of the labelled operand and of the output, not of the other operand, which may be a weight.
    """
    axes = dot_axes(equation)
    groups = [(axes.lhs_batch, axes.lhs_free, axes.lhs_contract), (axes.rhs_batch, axes.rhs_free, axes.rhs_contract)]
    # Per operand the flat positions that those along its batch, free and contracted axes add up to.
    places = [
        [_places(shape_of(atom), part) for part in group] for atom, group in zip(equation.inputs, groups, strict=True)
    ]
    batch, *free = places[0][0].size, places[0][1].size, places[1][1].size
    rows = units.transpose([axis for group in groups[side] for axis in group]).reshape(batch * free[side], -1)
    row, column = np.nonzero(rows >= 0)
    # One key for a row of the labelled operand and a unit; the entries of equal keys stand in their order.
    span = 1 + int(max(units.max(initial=0), fed.max(initial=0)))
    keys = row * span + rows[row, column]
    order = np.argsort(keys, kind="stable")
    keys, column = keys[order], column[order]
    output = np.indices((batch, *free)).reshape(3, -1)
    fed = fed.ravel()
    wanted = (output[0] * free[side] + output[1 + side]) * span + fed
    first = np.searchsorted(keys, wanted, "left")
    counts = np.where(fed >= 0, np.searchsorted(keys, wanted, "right") - first, 0)
    entry = np.arange(max(1, counts.max(initial=0)))
    mask = entry < counts[:, None]
    contracted = np.append(column, 0)[np.where(mask, first[:, None] + entry, len(column))]
    lhs, rhs = (
        np.where(mask, (of_batch[output[0]] + of_free[output[1 + i]])[:, None] + of_contract[contracted], 0)
        for i, (of_batch, of_free, of_contract) in enumerate(places)
    )
    return LocalDot(lhs.astype(np.int32), rhs.astype(np.int32), mask)


def _places(shape: tuple[int, ...], axes: list[int]) -> np.ndarray:
    """What the indices along some axes, in that order, add to an element's flat position."""
    strides = [int(np.prod(shape[axis + 1 :], dtype=int)) for axis in axes]
    return sum(
        (index * stride for index, stride in zip(np.indices([shape[a] for a in axes]), strides, strict=True)),
        start=np.zeros([shape[a] for a in axes], int),
    ).ravel()
