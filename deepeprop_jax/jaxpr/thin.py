"""Arrays of numbers that do not change along some axes, held once for those: the axis has stride 0.

Such an array has its full shape, and moves as any other does: a transpose, a slice or a new axis keeps the stride. What
computes on arrays goes through ``each`` or ``reduce`` here, which work on what is held. The labels of a weight are
constant along one of its axes mostly, so they cost a vector and not the size of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np


def core(x: np.ndarray) -> np.ndarray:
    """What is held: size 1 along the axes along which x has stride 0."""
    return x[(*(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides), ...)]


def each(function: Callable[..., np.ndarray], *xs: np.ndarray) -> np.ndarray:
    """An element-wise function of arrays whose shapes broadcast."""
    return np.broadcast_to(function(*map(core, xs)), np.broadcast_shapes(*(x.shape for x in xs)))


def reduce(ufunc: np.ufunc, x: np.ndarray, axes: Collection[int], initial: int) -> np.ndarray:
    """``ufunc``, a minimum or maximum, along axes."""
    shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
    return np.broadcast_to(ufunc.reduce(core(x), axis=tuple(axes), initial=initial), shape)


def constant(value: int, shape: Sequence[int]) -> np.ndarray:
    """The same number everywhere, int32."""
    return np.broadcast_to(np.int32(value), tuple(shape))


def together(function: Callable[..., np.ndarray], xs: Sequence[np.ndarray], moved: Collection[int]) -> np.ndarray:
    """A function of arrays of equally many axes that moves, adds or drops entries along the axes in ``moved`` alone."""
    still = [axis for axis in range(xs[0].ndim) if axis not in moved and all(x.strides[axis] == 0 for x in xs)]
    index = (*(slice(0, 1) if axis in still else slice(None) for axis in range(xs[0].ndim)), ...)
    found = function(*(x[index] for x in xs))
    return np.broadcast_to(found, [xs[0].shape[a] if a in still else size for a, size in enumerate(found.shape)])


def compact(x: np.ndarray) -> np.ndarray:
    """The same numbers, with stride 0 along every axis along which they do not change."""
    held = core(x)
    for axis in range(held.ndim):
        first = held[(slice(None),) * axis + (slice(0, 1),)]
        if held.shape[axis] > 1 and (held == first).all():
            held = first
    return np.broadcast_to(held, x.shape)
