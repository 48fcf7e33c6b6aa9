"""Structural primitives, which only move elements: what they do to arrays of any kind, element numbers or labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.program import Equation


def _broadcast_in_dim(equation: Equation, x: np.ndarray) -> np.ndarray:
    needed = equation.outputs[0].aval.shape
    shape = [1] * len(needed)
    for axis, size in zip(equation.broadcast_axes, x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), needed)


def _pad(equation: Equation, x: np.ndarray, fill: np.ndarray) -> np.ndarray:
    for axis, amounts in enumerate(equation.padding):
        if any(amounts):
            x = thin.together(functools.partial(_pad_axis, axis, *amounts, fill), [x], [axis])
    return x


def _pad_axis(axis: int, low: int, high: int, interior: int, fill: np.ndarray, x: np.ndarray) -> np.ndarray:
    size = x.shape[axis]
    length = low + high + size + max(size - 1, 0) * interior
    positions = low + np.arange(size) * (interior + 1)
    kept = (positions >= 0) & (positions < length)
    found = np.full((*x.shape[:axis], length, *x.shape[axis + 1 :]), fill, x.dtype)
    np.moveaxis(found, axis, 0)[positions[kept]] = np.moveaxis(x, axis, 0)[kept]
    return found


def _concatenate(axis: int, xs: Sequence[np.ndarray]) -> np.ndarray:
    return thin.together(lambda *parts: np.concatenate(parts, axis), xs, [axis])


_STRUCTURAL: dict[str, Callable[..., np.ndarray | list[np.ndarray]]] = {
    "reshape": lambda equation, x: x.reshape(equation.outputs[0].aval.shape),
    "transpose": lambda equation, x: x.transpose(equation.permutation),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda equation, *xs: _concatenate(equation.axis, xs),
    "stack": lambda equation, *xs: _concatenate(equation.axis, [np.expand_dims(x, equation.axis) for x in xs]),
    "unstack": lambda equation, x: list(np.moveaxis(x, equation.axis, 0)),
    "slice": lambda equation, x: x[equation.slices],
    "split": lambda equation, x: np.split(x, np.cumsum(equation.sizes)[:-1], equation.axis),
    "squeeze": lambda equation, x: np.squeeze(x, equation.axes),
    "rev": lambda equation, x: np.flip(x, equation.axes),
    "pad": _pad,
    "copy": lambda equation, x: x,
    "copy_p": lambda equation, x: x,
}


def is_structural(equation: Equation) -> bool:
    """Whether a primitive only moves elements."""
    return equation.name in _STRUCTURAL and not (equation.name == "reshape" and equation.axes)


def rearrange(equation: Equation, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What a structural primitive does to any arrays of its operands' shapes."""
    result = _STRUCTURAL[equation.name](equation, *operands)
    return result if isinstance(result, list) else [result]
