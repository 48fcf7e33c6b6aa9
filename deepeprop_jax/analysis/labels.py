"""Unit labels through a linear program: for every element, the one unit that it depends on, or that it feeds.

The programs are VJPs, linear in a cotangent of the new carry. A label is an interval [low, high] of unit numbers:
empty (depends on no unit), a point (on one unit), or wider (mixed). Joining two labels takes min and max, so a point
stays a point only where both agree. Structural primitives move labels; an unknown primitive joins everything it sees,
which is sound: it can only cost the dense path.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepeprop_jax.analysis.local_dot import LocalDot, local_dot
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.primitives import LINEAR_ELEMENTWISE
from deepeprop_jax.jaxpr.program import Atom, Equation, Variable, bind, dependents, dot_axes, is_variable, shape_of

_NO_LOW = 2**30
_NO_HIGH = -(2**30)


class Labels(NamedTuple):
    """The labels of one variable: two int32 arrays of its shape, each with stride 0 where it does not change."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Labels:
        """Every element depends on no unit."""
        return cls(thin.constant(_NO_LOW, shape), thin.constant(_NO_HIGH, shape))

    @classmethod
    def of(cls, units: Any) -> Labels:
        """Every element depends on the unit given for it."""
        units = thin.each(lambda x: x.astype(np.int32), np.asarray(units))
        return cls(units, units)

    def join(self, other: Labels) -> Labels:
        """Depends on what either depends on; shapes broadcast."""
        return Labels(thin.each(np.minimum, self.low, other.low), thin.each(np.maximum, self.high, other.high))

    def whole(self, shape: tuple[int, ...]) -> Labels:
        """Every element of an array of ``shape`` depends on all that these depend on."""
        one = self.reduce(tuple(range(self.low.ndim)))
        return one.map(lambda x: np.broadcast_to(x, shape))

    def reduce(self, axes: tuple[int, ...]) -> Labels:
        """Join along axes."""
        low = thin.reduce(np.minimum, self.low, axes, _NO_LOW)
        return Labels(low, thin.reduce(np.maximum, self.high, axes, _NO_HIGH))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Labels:
        """Move the labels as a structural function moves elements."""
        return Labels(function(self.low), function(self.high))

    @property
    def empty(self) -> np.ndarray:
        """Which elements depend on no unit."""
        return thin.each(np.greater, self.low, self.high)

    @property
    def pure(self) -> bool:
        """Whether no element is mixed."""
        return bool(thin.core(thin.each(np.greater_equal, self.low, self.high)).all())

    @property
    def unit(self) -> np.ndarray:
        """Where pure, the unit that each element depends on; 0 where on none."""
        return thin.each(lambda low, high: np.where(low > high, 0, low), self.low, self.high)

    def within(self, units: np.ndarray) -> bool:
        """Whether every element depends on its own unit at most."""

        def inside(low: np.ndarray, high: np.ndarray, unit: np.ndarray) -> np.ndarray:
            return (low > high) | ((low == unit) & (high == unit))

        return bool(thin.core(thin.each(inside, self.low, self.high, units)).all())


# --- structural primitives: the same rearrangement for values, element numbers and labels ----------------------------


def _broadcast_in_dim(params: Mapping, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _pad(params: Mapping, x: np.ndarray, fill: np.ndarray) -> np.ndarray:
    for axis, (low, high, interior) in enumerate(params["padding_config"]):
        if low or high or interior:
            size = x.shape[axis]
            length = low + high + size + max(size - 1, 0) * interior
            positions = low + np.arange(size) * (interior + 1)
            kept = (positions >= 0) & (positions < length)
            x = thin.together(functools.partial(_place, axis, length, positions, kept, fill), [x], [axis])
    return x


def _place(
    axis: int, length: int, positions: np.ndarray, kept: np.ndarray, fill: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The entries that are kept along an axis at their positions, ``fill`` elsewhere."""
    found = np.full((*x.shape[:axis], length, *x.shape[axis + 1 :]), fill, x.dtype)
    np.moveaxis(found, axis, 0)[positions[kept]] = np.moveaxis(x, axis, 0)[kept]
    return found


def _concatenate(axis: int, *xs: np.ndarray) -> np.ndarray:
    return thin.together(lambda *parts: np.concatenate(parts, axis), xs, [axis])


def _slice(params: Mapping, x: np.ndarray) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(start, limit, stride) for start, limit, stride in ends)]


def _split(params: Mapping, x: np.ndarray) -> list[np.ndarray]:
    return np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"])


def _unstack(params: Mapping, x: np.ndarray) -> list[np.ndarray]:
    return list(np.moveaxis(x, params["axis"], 0))


_STRUCTURAL: dict[str, Callable[..., Any]] = {
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda params, *xs: _concatenate(params["dimension"], *xs),
    "stack": lambda params, *xs: _concatenate(params["axis"], *(np.expand_dims(x, params["axis"]) for x in xs)),
    "unstack": _unstack,
    "slice": _slice,
    "split": _split,
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "rev": lambda params, x: np.flip(x, tuple(params["dimensions"])),
    "pad": _pad,
    "copy": lambda params, x: x,
    "copy_p": lambda params, x: x,
}


def _is_structural(equation: Equation) -> bool:
    return equation.name in _STRUCTURAL and not (equation.name == "reshape" and equation.params.get("dimensions"))


def rearrange(equation: Equation, operands: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """What a structural primitive does to any arrays of its operands' shapes; None for other primitives."""
    if not _is_structural(equation):
        return None
    result = _STRUCTURAL[equation.name](equation.params, *operands)
    return result if isinstance(result, list) else [result]


# --- what an output depends on ---------------------------------------------------------------------------------------


def _forward(equation: Equation, inputs: Sequence[Labels | None]) -> list[Labels]:
    """Labels of an equation's outputs from those of its inputs (None: does not depend on the cotangent)."""
    labels = [Labels.none(shape_of(a)) if x is None else x for x, a in zip(inputs, equation.inputs, strict=True)]
    shapes = [output.aval.shape for output in equation.outputs]
    lows = rearrange(equation, [label.low for label in labels])
    if lows is not None:
        highs = rearrange(equation, [label.high for label in labels])
        return [Labels(low, high) for low, high in zip(lows, highs or [], strict=True)]
    if equation.name in LINEAR_ELEMENTWISE:
        joined = functools.reduce(Labels.join, labels)
        return [joined.map(lambda x: np.broadcast_to(x, shapes[0]))]
    if equation.name == "reduce_sum":
        return [labels[0].reduce(tuple(equation.params["axes"]))]
    if equation.name == "dot_general":
        axes = dot_axes(equation)
        lhs = labels[0].reduce(tuple(axes.lhs_contract)).map(_ordered(axes.lhs_batch, axes.lhs_free))
        rhs = labels[1].reduce(tuple(axes.rhs_contract)).map(_ordered(axes.rhs_batch, axes.rhs_free))
        batch, lhs_free, rhs_free = len(axes.lhs_batch), len(axes.lhs_free), len(axes.rhs_free)
        lhs = lhs.map(lambda x: x.reshape(x.shape + (1,) * rhs_free))
        rhs = rhs.map(lambda x: x.reshape(x.shape[:batch] + (1,) * lhs_free + x.shape[batch:]))
        return [lhs.join(rhs)]
    everything = functools.reduce(Labels.join, [label.whole(()) for label in labels])
    return [everything.whole(shape) for shape in shapes]


def _ordered(batch: list[int], free: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Bring the axes left over by a contraction into the order (batch, free)."""
    left = sorted(batch + free)
    return lambda x: x.transpose([left.index(axis) for axis in batch + free])


class Labelling(NamedTuple):
    """What each variable of a linear program depends on.

    Attributes:
      labels: per variable that depends on the cotangent.
      culprits: per variable that is mixed, the name of the primitive that mixed it first.
      local_dots: the dots that were localised, by ``id`` of their equation.
    """

    labels: dict[Variable, Labels]
    culprits: dict[Variable, str]
    local_dots: dict[int, LocalDot]

    def of(self, atom: Atom) -> Labels | None:
        """Labels of an atom; None where it does not depend on the cotangent."""
        return self.labels.get(atom) if is_variable(atom) else None


def depends_on(
    equations: Sequence[Equation], seeds: Mapping[Variable, Labels], feeds: Mapping[Variable, Labels] | None = None
) -> Labelling:
    """Push labels forward from the cotangents in ``seeds``.

    With ``feeds`` (the backward labels), a dot that would mix units is localised instead: its entries are kept where
    the unit of the contracted element is the unit that the output element feeds.
    """
    flow = Labelling(dict(seeds), {}, {})
    for equation in equations:
        inputs = [flow.of(atom) for atom in equation.inputs]
        if all(label is None for label in inputs):
            continue
        outputs = _forward(equation, inputs)
        if feeds is not None and equation.name == "dot_general" and not outputs[0].pure:
            target = feeds.get(equation.outputs[0])
            side = 0 if inputs[0] is not None else 1
            labels = inputs[side]
            if target is not None and target.pure and labels is not None and labels.pure and inputs[1 - side] is None:
                units = [np.where(label.empty, -1, label.low) for label in (labels, target)]
                flow.local_dots[id(equation)] = local_dot(equation, side, *units)
                outputs = [target]
        blamed = [flow.culprits[atom] for atom in equation.inputs if is_variable(atom) and atom in flow.culprits]
        for variable, label in zip(equation.outputs, outputs, strict=True):
            flow.labels[variable] = label
            if not label.pure:
                flow.culprits[variable] = blamed[0] if blamed else equation.name
    return flow


def localised(flow: Labelling) -> Callable[..., list[Any]]:
    """An evaluation rule that runs the localised dots of ``flow`` in place of the dots."""

    def rule(equation: Equation, *values: Any) -> list[Any]:
        local_dot = flow.local_dots.get(id(equation))
        return bind(equation, *values) if local_dot is None else local_dot(equation, *values)

    return rule


# --- what an input feeds ---------------------------------------------------------------------------------------------


_UNDONE: dict[str, Callable[[Mapping, np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "reshape": lambda params, x, shape: x.reshape(shape),
    "squeeze": lambda params, x, shape: x.reshape(shape),
    "transpose": lambda params, x, shape: x.transpose(np.argsort(params["permutation"])),
    "rev": lambda params, x, shape: np.flip(x, tuple(params["dimensions"])),
    "copy": lambda params, x, shape: x,
    "copy_p": lambda params, x, shape: x,
}
"""How to undo those that move every element to one place; the last argument is the operand's shape."""


def _before(equation: Equation, labels: Sequence[Labels], shapes: Sequence[tuple[int, ...]]) -> list[Labels] | None:
    """Labels of a structural primitive's operands: of all places that an element is moved to. None for others."""
    undone = _UNDONE.get(equation.name)
    if not _is_structural(equation):
        return None
    if undone is not None:
        return [labels[0].map(lambda x: undone(equation.params, x, shapes[0]))]
    offsets = np.cumsum([0, *(int(np.prod(shape, dtype=int)) for shape in shapes)])
    numbers = [np.arange(*ends).reshape(shape) for ends, shape in zip(itertools.pairwise(offsets), shapes, strict=True)]
    moved = rearrange(equation, numbers) or []
    low, high = np.full(offsets[-1], _NO_LOW, np.int32), np.full(offsets[-1], _NO_HIGH, np.int32)
    for index, label in zip(moved, labels, strict=True):
        # Along an axis of stride 0 one element is moved to many places.
        many = tuple(axis for axis, stride in enumerate(index.strides) if stride == 0)
        index, joined = thin.core(index), label.reduce(many).map(lambda x, many=many: np.expand_dims(x, many))
        np.minimum.at(low, index, joined.low)
        np.maximum.at(high, index, joined.high)
    return [Labels(low[number], high[number]) for number in numbers]


def _backward(equation: Equation, outputs: Sequence[Labels | None]) -> list[Labels]:
    """Labels of what an equation's inputs feed, from what its outputs feed (None: nothing)."""
    labels = [Labels.none(x.aval.shape) if y is None else y for y, x in zip(outputs, equation.outputs, strict=True)]
    shapes = [shape_of(atom) for atom in equation.inputs]
    moved = _before(equation, labels, shapes)
    if moved is not None:
        return moved
    if equation.name in LINEAR_ELEMENTWISE:
        return [labels[0] if shape == labels[0].low.shape else labels[0].whole(shape) for shape in shapes]
    if equation.name == "reduce_sum":
        axes = tuple(equation.params["axes"])
        return [labels[0].map(lambda x: np.broadcast_to(np.expand_dims(x, axes), shapes[0]))]
    if equation.name == "dot_general":
        axes = dot_axes(equation)
        batch, lhs_free, rhs_free = len(axes.lhs_batch), len(axes.lhs_free), len(axes.rhs_free)
        lhs = labels[0].reduce(tuple(range(batch + lhs_free, batch + lhs_free + rhs_free)))
        rhs = labels[0].reduce(tuple(range(batch, batch + lhs_free)))
        return [
            lhs.map(_spread(axes.lhs_batch + axes.lhs_free + axes.lhs_contract, batch + lhs_free, shapes[0])),
            rhs.map(_spread(axes.rhs_batch + axes.rhs_free + axes.rhs_contract, batch + rhs_free, shapes[1])),
        ]
    everything = functools.reduce(Labels.join, [label.whole(()) for label in labels])
    return [everything.whole(shape) for shape in shapes]


def _spread(order: list[int], kept: int, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Repeat labels of the first ``kept`` axes in ``order`` along the others, then undo the order."""

    def spread(x: np.ndarray) -> np.ndarray:
        ordered = tuple(shape[axis] for axis in order)
        return np.broadcast_to(x.reshape(ordered[:kept] + (1,) * (len(order) - kept)), ordered).transpose(
            np.argsort(order)
        )

    return spread


def feeds(
    equations: Sequence[Equation], seeds: Mapping[Variable, Labels], linear: set[Variable]
) -> dict[Variable, Labels]:
    """Push labels backward from the outputs in ``seeds`` to the variables in ``linear``: which unit's derivative does
    each of them feed?"""
    found = dict(seeds)
    for equation in reversed(equations):
        outputs = [found.get(output) for output in equation.outputs]
        if equation.outputs[0] not in linear or all(label is None for label in outputs):
            continue
        for atom, label in zip(equation.inputs, _backward(equation, outputs), strict=True):
            if is_variable(atom) and atom in linear:
                found[atom] = found[atom].join(label) if atom in found else label
    return found


# --- both: the recurrence, cut to its unit-local entries -------------------------------------------------------------


def within_units(flow: Labelling, outputs: Sequence[Atom], units: Sequence[np.ndarray]) -> bool:
    """Whether every element of every output depends on its own unit at most."""
    labels = [flow.of(atom) for atom in outputs]
    return all(label is None or label.within(unit) for label, unit in zip(labels, units, strict=True))


def cut_to_units(
    equations: Sequence[Equation],
    outputs: Sequence[Atom],
    units: Sequence[np.ndarray],
    seeds: Mapping[Variable, Labels],
) -> Labelling:
    """The flow with every dot that couples units cut to the entries that feed the outputs' own units."""
    targets: dict[Variable, Labels] = {}
    for atom, unit in zip(outputs, units, strict=True):
        if is_variable(atom):
            label = Labels.of(unit)
            targets[atom] = targets[atom].join(label) if atom in targets else label
    return depends_on(equations, seeds, feeds(equations, targets, dependents(equations, seeds)))
