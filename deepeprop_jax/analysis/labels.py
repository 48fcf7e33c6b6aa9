"""Unit labels through a linear program: for every element, the one unit that it depends on, or that it feeds.

The programs are VJPs, linear in a cotangent of the new carry. A label is an interval [low, high] of unit numbers:
empty (depends on no unit), a point (on one unit), or wider (mixed). Joining two labels takes min and max, so a point
stays a point only where both agree. Structural primitives move labels; an unknown primitive joins everything it sees,
which is sound: it can only cost the dense path.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.batched import bind
from deepeprop_jax.jaxpr.primitives import LINEAR_ELEMENTWISE
from deepeprop_jax.jaxpr.program import Atom, DotAxes, Equation, Rule, Variable, dependents, dot_axes, is_in, shape_of
from deepeprop_jax.jaxpr.rearrange import is_structural, rearrange

_NO_LOW = 2**30
_NO_HIGH = -(2**30)


class Labels(NamedTuple):
    """The labels of one variable: two int32 arrays of its shape, each with stride 0 where it does not change."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Labels:
        """Every element depends on no unit."""
        return cls(np.broadcast_to(np.int32(_NO_LOW), shape), np.broadcast_to(np.int32(_NO_HIGH), shape))

    @classmethod
    def of(cls, units: np.ndarray) -> Labels:
        """Every element depends on the unit given for it."""
        units = thin.each(lambda x: x.astype(np.int32), units)
        return cls(units, units)

    def join(self, other: Labels) -> Labels:
        """Depends on what either depends on; shapes broadcast."""
        return Labels(thin.each(np.minimum, self.low, other.low), thin.each(np.maximum, self.high, other.high))

    def reduce(self, axes: Sequence[int]) -> Labels:
        """Join along axes."""
        low = thin.reduce(np.minimum, self.low, axes, _NO_LOW)
        return Labels(low, thin.reduce(np.maximum, self.high, axes, _NO_HIGH))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Labels:
        """Move the labels as a structural function moves elements."""
        return Labels(function(self.low), function(self.high))

    def broadcast(self, shape: tuple[int, ...]) -> Labels:
        """Labels along new axes, of the units that they name now."""
        return self.map(lambda x: np.broadcast_to(x, shape))

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


def _everywhere(labels: Sequence[Labels], shapes: Sequence[tuple[int, ...]]) -> list[Labels]:
    """Every element of arrays of these shapes depends on all that any label does."""
    everything = functools.reduce(Labels.join, [label.reduce(range(label.low.ndim)) for label in labels])
    return [everything.broadcast(shape) for shape in shapes]


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
        return self.labels[atom] if is_in(atom, self.labels) else None

    def within(self, outputs: Sequence[Atom], units: Sequence[np.ndarray]) -> bool:
        """Whether every element of every output depends on its own unit at most."""
        labels = map(self.of, outputs)
        return all(label is None or label.within(unit) for label, unit in zip(labels, units, strict=True))

    def rule(self) -> Rule:
        """How to evaluate an equation with the localised dots in place of the dots."""

        def rule(equation: Equation, *values):
            return self.local_dots.get(id(equation), bind)(equation, *values)

        return rule if self.local_dots else bind


# --- what an output depends on ---------------------------------------------------------------------------------------


def depends_on(
    equations: Sequence[Equation],
    seeds: Mapping[Variable, Labels],
    feeds: Mapping[Variable, Labels] | None = None,
    elementwise: Collection[str] = LINEAR_ELEMENTWISE,
    reductions: Collection[str] = ("reduce_sum",),
) -> Labelling:
    """Push labels forward from the variables in ``seeds``.

    Args:
      feeds: what each variable feeds. A dot that would mix units is then localised instead: its entries are kept where
        the unit of the contracted element is the unit that the output element feeds.
      elementwise, reductions: primitives that are looked into; others than the linear ones where nothing but labels is
        asked for.
    """
    flow = Labelling(dict(seeds), {}, {})
    for equation in equations:
        inputs = [flow.of(atom) for atom in equation.inputs]
        if all(label is None for label in inputs):
            continue
        outputs = _forward(equation, inputs, elementwise, reductions)
        if feeds is not None and equation.name == "dot_general" and not outputs[0].pure:
            target = feeds.get(equation.outputs[0])
            side = 0 if inputs[0] is not None else 1
            labels = inputs[side]
            if target is not None and target.pure and labels is not None and labels.pure and inputs[1 - side] is None:
                units = [np.where(label.empty, -1, label.low) for label in (labels, target)]
                flow.local_dots[id(equation)] = _local_dot(equation, side, *units)
                outputs = [target]
        blamed = [flow.culprits[atom] for atom in equation.inputs if is_in(atom, flow.culprits)]
        for variable, label in zip(equation.outputs, outputs, strict=True):
            flow.labels[variable] = label
            if not label.pure:
                flow.culprits[variable] = blamed[0] if blamed else equation.name
    return flow


def _forward(
    equation: Equation, inputs: Sequence[Labels | None], elementwise: Collection[str], reductions: Collection[str]
) -> list[Labels]:
    """Labels of an equation's outputs from those of its inputs (None: does not depend on the cotangent)."""
    labels = [Labels.none(shape_of(a)) if x is None else x for x, a in zip(inputs, equation.inputs, strict=True)]
    shapes = [output.aval.shape for output in equation.outputs]
    if equation.name in elementwise:
        return [functools.reduce(Labels.join, labels).broadcast(shapes[0])]
    if equation.name in reductions:
        return [labels[0].reduce(equation.axes)]
    if is_structural(equation):
        moved = (rearrange(equation, part) for part in zip(*labels, strict=True))
        return list(itertools.starmap(Labels, zip(*moved, strict=True)))
    if equation.name == "dot_general":
        sides = dot_axes(equation)
        lhs, rhs = (x.reduce(side.contract).map(_ordered(side)) for x, side in zip(labels, sides, strict=True))
        batch, lhs_free, rhs_free = len(sides[0].batch), len(sides[0].free), len(sides[1].free)
        lhs = lhs.map(lambda x: x.reshape(x.shape + (1,) * rhs_free))
        rhs = rhs.map(lambda x: x.reshape(x.shape[:batch] + (1,) * lhs_free + x.shape[batch:]))
        return [lhs.join(rhs)]
    if equation.name == "gather":
        parts = (_along(label, kept, shapes[0]) for label, kept in zip(labels, equation.gather_axes, strict=True))
        return [functools.reduce(Labels.join, parts)]
    return _everywhere(labels, shapes)


def _along(label: Labels, kept: Mapping[int, int], shape: tuple[int, ...]) -> Labels:
    """Labels of an array of this shape, along whose axes those of ``kept`` lie; of all elements along other axes."""
    reduced = label.reduce([axis for axis in range(label.low.ndim) if axis not in kept])
    order = np.argsort([kept[axis] for axis in sorted(kept)])

    def place(x: np.ndarray) -> np.ndarray:
        sizes = [1] * len(shape)
        for axis in kept:
            sizes[kept[axis]] = shape[kept[axis]]
        return np.broadcast_to(x.transpose(order).reshape(sizes), shape)

    return reduced.map(place)


def _ordered(side: DotAxes) -> Callable[[np.ndarray], np.ndarray]:
    """Bring the axes left over by a contraction into the order (batch, free)."""
    wanted = side.batch + side.free
    return lambda x: x.transpose([sorted(wanted).index(axis) for axis in wanted])


# --- what an input feeds, and the recurrence cut to its unit-local entries -------------------------------------------


def cut_to_units(
    equations: Sequence[Equation],
    outputs: Sequence[Atom],
    units: Sequence[np.ndarray],
    seeds: Mapping[Variable, Labels],
) -> Labelling:
    """The flow with every dot that couples units cut to the entries that feed the outputs' own units.

    For that labels are pushed backward from the outputs first: which unit's derivative does each variable feed?
    """
    linear = dependents(equations, seeds)
    feeds: dict[Variable, Labels] = {}

    def feed(atoms: Sequence[Atom], labels: Sequence[Labels]) -> None:
        for atom, label in zip(atoms, labels, strict=True):
            if is_in(atom, linear):
                feeds[atom] = feeds[atom].join(label) if atom in feeds else label

    feed(outputs, [Labels.of(unit) for unit in units])
    for equation in reversed(equations):
        fed = [feeds.get(output) for output in equation.outputs]
        if equation.outputs[0] in linear and any(label is not None for label in fed):
            feed(equation.inputs, _backward(equation, fed))
    return depends_on(equations, seeds, feeds)


def _backward(equation: Equation, outputs: Sequence[Labels | None]) -> list[Labels]:
    """Labels of what an equation's inputs feed, from what its outputs feed (None: nothing)."""
    labels = [Labels.none(x.aval.shape) if y is None else y for y, x in zip(outputs, equation.outputs, strict=True)]
    shapes = [shape_of(atom) for atom in equation.inputs]
    if is_structural(equation):
        return _moved_back(equation, labels, shapes)
    if equation.name in LINEAR_ELEMENTWISE:
        whole = _everywhere(labels, shapes)
        return [labels[0] if shape == labels[0].low.shape else x for x, shape in zip(whole, shapes, strict=True)]
    if equation.name == "reduce_sum":
        return [labels[0].map(lambda x: np.broadcast_to(np.expand_dims(x, equation.axes), shapes[0]))]
    if equation.name == "dot_general":
        sides = dot_axes(equation)
        start = len(sides[0].batch)
        middle, end = start + len(sides[0].free), labels[0].low.ndim
        kept = labels[0].reduce(range(middle, end)), labels[0].reduce(range(start, middle))
        triples = zip(kept, sides, shapes, strict=True)
        return [label.map(functools.partial(_spread, side, shape)) for label, side, shape in triples]
    return _everywhere(labels, shapes)


def _moved_back(equation: Equation, labels: Sequence[Labels], shapes: Sequence[tuple[int, ...]]) -> list[Labels]:
    """Labels of a structural primitive's operands: of all places that an element is moved to."""
    offsets = np.cumsum([0, *(int(np.prod(shape, dtype=int)) for shape in shapes)])
    numbers = [np.arange(*ends).reshape(shape) for ends, shape in zip(itertools.pairwise(offsets), shapes, strict=True)]
    low, high = np.full(offsets[-1], _NO_LOW, np.int32), np.full(offsets[-1], _NO_HIGH, np.int32)
    for index, label in zip(rearrange(equation, numbers), labels, strict=True):
        # Along an axis of stride 0 one element is moved to many places.
        many = tuple(axis for axis, stride in enumerate(index.strides) if stride == 0)
        index, joined = thin.core(index), label.reduce(many).map(lambda x, many=many: np.expand_dims(x, many))
        np.minimum.at(low, index, joined.low)
        np.maximum.at(high, index, joined.high)
    return [Labels(low[number], high[number]) for number in numbers]


def _spread(side: DotAxes, shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
    """Repeat labels of batch and free axes along the contracted ones, each where the operand has it."""
    order = side.batch + side.free + side.contract
    filled = x.reshape(x.shape + (1,) * len(side.contract))
    return np.broadcast_to(filled, [shape[axis] for axis in order]).transpose(np.argsort(order))


# --- a matrix product cut to the entries that stay inside one unit ---------------------------------------------------


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


def _local_dot(equation: Equation, side: int, units: np.ndarray, fed: np.ndarray) -> LocalDot:
    """Keep the products whose labelled factor, the operand ``side``, depends on the unit that the output element feeds.

    Args:
      units: in the labelled operand's shape, the unit that each element depends on; -1 for none.
      fed: in the output's shape, the unit that each element feeds; -1 for none.

    Cost: of the size of the labelled operand and of the output, not of the other operand, which may be a weight.
    """
    groups = dot_axes(equation)
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
    steps = [np.arange(shape[axis]) * int(np.prod(shape[axis + 1 :], dtype=int)) for axis in axes]
    return functools.reduce(np.add.outer, steps, np.array(0)).ravel()
