"""Give every gate a matrix product and an array of its own: slices move back to what is sliced cheaply.

    slice(x @ W + b) = x @ slice(W) + slice(b)        slice(concatenate(A, B)) = A

Cells often compute all gates in one wide array and slice it. Inside a loop over steps those slices keep XLA's CPU
backend from fusing and vectorising what follows. Slices of parameters cost nothing: they are taken once.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from deepeprop_jax.jaxpr.primitives import ELEMENTWISE
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    dot_axes,
    shape_of,
    slice_of,
    squeezed,
)

Window = tuple[tuple[int, int], ...]
"""A block of an array: start and stop on every axis."""

Parts = list[tuple[Atom, Window]]
"""What a piece of an equation's output is computed from: per operand which block of it."""

_MOST_PIECES = 8
"""A cell with more gates than this is not known; one that reads its units one by one keeps its one matrix product."""


def unconcatenate(program: Program) -> Program:
    """Compute a wide value in pieces where all that is read of it is pieces.

        slice(f(a, b)) -> f(slice(a), slice(b))        f element-wise, or a matrix product in its free and batch axes

    A value is computed in pieces if nothing reads it whole, the pieces read are few and do not overlap, and its
    equation is element-wise, a broadcast, reshape, squeeze, transpose, concatenate, stack or ``dot_general``; else it
    stays whole, and slices are taken of it. So nothing is computed twice. Strided slices and every other primitive
    (custom derivative rules, loops, branches) read their operands whole and are never looked into. Inputs, constants
    and outputs stay; equations that no output needs go. Best done before a VJP is taken, whose matrix products are then
    those of the single gates too.
    """
    wanted, pieces = _plan(program)
    equations: list[Equation] = []
    made: dict[tuple[Variable, Window], Atom] = {}
    whole = {*program.inputs, *program.constants}

    def emitted(equation: Equation) -> Variable:
        equations.append(equation)
        return equation.outputs[0]

    def read(atom: Atom, window: Window) -> Atom:
        """A piece of a value that was computed in that piece, or whole."""
        if isinstance(atom, Variable) and (atom, window) in made:
            return made[atom, window]
        if window == _all(atom):
            return atom
        piece = emitted(slice_of(read(atom, _all(atom)), window))
        if isinstance(atom, Variable):
            made[atom, window] = piece
        return piece

    def may_stay(equation: Equation) -> bool:
        """Whether a split is of a whole value into parts read whole: its transpose, one concatenation, is cheapest."""
        source, outputs = equation.inputs[0], [output for output in equation.outputs if output in wanted]
        is_whole = not isinstance(source, Variable) or source in whole or (source, _all(source)) in made
        return equation.name != "slice" and is_whole and all([*wanted[output]] == [_all(output)] for output in outputs)

    for equation in program.equations:
        if not any(output in wanted for output in equation.outputs):
            continue
        views, output = _views(equation), equation.outputs[0]
        if output in pieces:
            for window, parts in pieces[output].items():
                inputs = list(itertools.starmap(read, parts))
                if equation.name == "concatenate" and len(inputs) == 1:
                    made[output, window] = inputs[0]
                else:
                    piece = Variable(jax.ShapeDtypeStruct(_sizes(window), output.aval.dtype))
                    made[output, window] = emitted(equation.replaced(inputs, [piece]))
        elif views and not may_stay(equation):
            for out, view in zip(equation.outputs, views, strict=True):
                for window in wanted.get(out, ()):
                    part = read(equation.inputs[0], view(window))
                    made[out, window] = emitted(squeezed(part, equation.axis)) if equation.name == "unstack" else part
        else:
            equations.append(equation.replaced([read(atom, _all(atom)) for atom in equation.inputs], equation.outputs))
            whole.update(equation.outputs)
    outputs = [read(atom, _all(atom)) for atom in program.outputs]
    return Program(equations, program.inputs, outputs, program.constants)


def crop_early(program: Program) -> Program:
    """Compute no more of a value than what a pad leaves of it that only crops, as the transpose of one that adds does.

    A program without one is left as it is.
    """
    equations = [_as_slice(equation) for equation in program.equations]
    is_same = all(new is old for new, old in zip(equations, program.equations, strict=True))
    return program if is_same else unconcatenate(program._replace(equations=equations))


def _as_slice(equation: Equation) -> Equation:
    crops = equation.name == "pad" and any(any(part) for part in equation.padding)
    if not crops or any(low > 0 or high > 0 or between for low, high, between in equation.padding):
        return equation
    sizes = shape_of(equation.inputs[0])
    window = [(-int(low), size + int(high)) for (low, high, _), size in zip(equation.padding, sizes, strict=True)]
    return Equation(jax.lax.slice_p, slice_of(equation.inputs[0], window).params, equation.inputs[:1], equation.outputs)


def _plan(program: Program) -> tuple[dict[Variable, dict[Window, None]], dict[Variable, dict[Window, Parts]]]:
    """Which windows of each variable are read, and how those are computed that are computed in pieces."""
    wanted: defaultdict[Variable, dict[Window, None]] = defaultdict(dict)  # windows as keys: a set that keeps its order
    pieces: dict[Variable, dict[Window, Parts]] = {}

    def reads(equation: Equation) -> Parts:
        views = _views(equation)
        if views:
            pairs = zip(equation.outputs, views, strict=True)
            return [(equation.inputs[0], view(window)) for output, view in pairs for window in wanted.get(output, ())]
        found = _in_pieces(equation, list(wanted.get(equation.outputs[0], ())))
        if not found:
            return [(atom, _all(atom)) for atom in equation.inputs]
        pieces[equation.outputs[0]] = found
        return [read for parts in found.values() for read in parts]

    def want(reads: Parts) -> None:
        for atom, window in reads:
            if isinstance(atom, Variable):
                wanted[atom][window] = None

    want([(atom, _all(atom)) for atom in program.outputs])
    for equation in reversed(program.equations):
        if any(output in wanted for output in equation.outputs):
            want(reads(equation))
    return dict(wanted), pieces


def _in_pieces(equation: Equation, windows: list[Window]) -> dict[Window, Parts] | None:
    """How to compute an equation's output in just these windows; None where it has to be, or had better be, whole."""
    rule = _RULES.get(equation.name)
    few = 0 < len(windows) <= _MOST_PIECES and _all(equation.outputs[0]) not in windows
    if rule is None or equation.is_sharded or not few or 0 in map(_size, windows):
        return None
    if not all(itertools.starmap(_apart, itertools.combinations(windows, 2))):
        return None
    found = {window: parts for window in windows if (parts := rule(equation, window))}
    return found if len(found) == len(windows) else None


# --- windows ---------------------------------------------------------------------------------------------------------


def _all(atom: Atom) -> Window:
    return tuple((0, size) for size in shape_of(atom))


def _sizes(window: Window) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in window)


def _size(window: Window) -> int:
    return int(np.prod(_sizes(window), dtype=int))


def _apart(a: Window, b: Window) -> bool:
    return any(min(i[1], j[1]) <= max(i[0], j[0]) for i, j in zip(a, b, strict=True))


def _views(equation: Equation) -> list[Callable[[Window], Window]] | None:
    """For an equation that only takes its input apart: per output, where a window of it lies in the input."""
    if equation.name == "slice" and all(part.step == 1 for part in equation.slices):
        return [_shift([part.start for part in equation.slices])]
    if equation.name == "split":
        rank, axis = len(shape_of(equation.inputs[0])), equation.axis
        starts = itertools.accumulate(map(int, equation.sizes[:-1]), initial=0)
        return [_shift([start if i == axis else 0 for i in range(rank)]) for start in starts]
    if equation.name == "unstack":
        axis = equation.axis
        return [lambda w, i=i: (*w[:axis], (i, i + 1), *w[axis:]) for i in range(len(equation.outputs))]
    return None


def _shift(offsets: Sequence[int]) -> Callable[[Window], Window]:
    return lambda window: tuple((start + o, stop + o) for (start, stop), o in zip(window, offsets, strict=True))


# --- one rule per primitive: a window of the output, from which windows of the operands? ------------------------------


def _elementwise(equation: Equation, window: Window) -> Parts:
    """An operand is a scalar, or has the output's axes, each of full length or of length one."""
    return [(x, _along(window, equation, x, range(len(window))) if shape_of(x) else ()) for x in equation.inputs]


def _along(window: Window, equation: Equation, atom: Atom, axes: Iterable[int]) -> Window:
    """The window of an operand whose axes are these of the output, or of length one."""
    full = shape_of(equation.outputs[0])
    return tuple(
        window[axis] if size == full[axis] else (0, 1) for axis, size in zip(axes, shape_of(atom), strict=True)
    )


def _broadcast_in_dim(equation: Equation, window: Window) -> Parts:
    (atom,) = equation.inputs
    return [(atom, _along(window, equation, atom, equation.broadcast_axes))]


def _concatenate(equation: Equation, window: Window) -> Parts:
    axis = equation.axis
    start, stop = window[axis]
    parts, offset = [], 0
    for atom in equation.inputs:
        size = shape_of(atom)[axis]
        part = max(start - offset, 0), min(stop - offset, size)
        if part[0] < part[1]:
            parts.append((atom, (*window[:axis], part, *window[axis + 1 :])))
        offset += size
    return parts


def _stack(equation: Equation, window: Window) -> Parts:
    axis = equation.axis
    return [(atom, (*window[:axis], *window[axis + 1 :])) for atom in equation.inputs[slice(*window[axis])]]


def _squeeze(equation: Equation, window: Window) -> Parts:
    (atom,), kept = equation.inputs, iter(window)
    rank = len(shape_of(atom))
    dropped = {axis % rank for axis in equation.axes}
    return [(atom, tuple((0, 1) if axis in dropped else next(kept) for axis in range(rank)))]


def _transpose(equation: Equation, window: Window) -> Parts:
    return [(equation.inputs[0], tuple(window[axis] for axis in np.argsort(equation.permutation)))]


def _dot_general(equation: Equation, window: Window) -> Parts:
    lhs, rhs = dot_axes(equation)
    left, right = map(list, map(_all, equation.inputs))
    places = [[(left, i), (right, j)] for i, j in zip(lhs.batch, rhs.batch, strict=True)]
    places += [[(left, i)] for i in lhs.free] + [[(right, j)] for j in rhs.free]
    for part, place in zip(window, places, strict=True):
        for operand, axis in place:
            operand[axis] = part
    return list(zip(equation.inputs, (tuple(left), tuple(right)), strict=True))


def _reshape(equation: Equation, window: Window) -> Parts | None:
    """Group the axes where both shapes have come as far; in each group the window must be one block on both sides."""
    (atom,), new = equation.inputs, shape_of(equation.outputs[0])
    old = shape_of(atom)
    if equation.axes or 0 in old:
        return None
    new_ends, old_ends = (
        {size: axis for axis, size in enumerate(itertools.accumulate(shape, operator.mul, initial=1))}
        for shape in (new, old)
    )
    part: list[tuple[int, int]] = []
    i = j = 0
    for size in sorted(new_ends.keys() & old_ends.keys()):
        group = _regroup(window[i : new_ends[size]], new[i : new_ends[size]], old[j : old_ends[size]])
        if group is None:
            return None
        part += group
        i, j = new_ends[size], old_ends[size]
    return [(atom, tuple(part))]


def _regroup(window: Window, new: tuple[int, ...], old: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """A window of axes ``new`` as one of axes ``old``, where it is contiguous and a window there too."""
    first = last = 0
    for (start, stop), size in zip(window, new, strict=True):
        first, last = first * size + start, last * size + stop - 1
    corners = zip(np.unravel_index(first, old), np.unravel_index(last, old), strict=True)
    part = [(int(low), int(high) + 1) for low, high in corners]
    # Elements between two corners lie between them in memory too: equal counts mean equal sets.
    blocks = all(low < high for low, high in part) and _size(window) == last - first + 1 == _size(tuple(part))
    return part if blocks else None


_RULES: dict[str, Callable[[Equation, Window], Parts | None]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
