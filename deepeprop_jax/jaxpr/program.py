"""A program as data: equations in order, and slices of them; the only file that knows a primitive's parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex
import numpy as np

Literal = jex.Literal


class Variable:
    """A value of a flat program; every call of an inlined function gets variables of its own."""

    __slots__ = ("aval",)

    def __init__(self, aval: jax.ShapeDtypeStruct):
        self.aval: jax.ShapeDtypeStruct = aval


Atom: TypeAlias = Variable | jex.Literal


class Equation:
    """One primitive applied to atoms."""

    __slots__ = ("inputs", "outputs", "params", "primitive")

    def __init__(
        self, primitive: jex.Primitive, params: dict[str, Any], inputs: Sequence[Atom], outputs: Sequence[Variable]
    ):
        self.primitive: jex.Primitive = primitive
        self.params: dict[str, Any] = params
        self.inputs: list[Atom] = list(inputs)
        self.outputs: list[Variable] = list(outputs)

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    @property
    def axis(self) -> int:
        """Along which a concatenate, stack, split or unstack works."""
        return self.params["dimension" if self.name == "concatenate" else "axis"]

    @property
    def axes(self) -> tuple[int, ...]:
        """Which a reduction sums, a squeeze drops, a rev reverses; empty for a reshape that keeps the order."""
        return tuple(self.params.get("axes") or self.params.get("dimensions") or ())

    @property
    def permutation(self) -> tuple[int, ...]:
        """Of a transpose: per axis of its output, that of its input."""
        return self.params["permutation"]

    @property
    def broadcast_axes(self) -> tuple[int, ...]:
        """Of a broadcast_in_dim: per axis of its input, that of its output."""
        return self.params["broadcast_dimensions"]

    @property
    def padding(self) -> tuple[tuple[int, int, int], ...]:
        """Of a pad: per axis, how much before, behind and between."""
        return self.params["padding_config"]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of a slice: per axis, start, stop and step."""
        starts, stops = self.params["start_indices"], self.params["limit_indices"]
        return tuple(map(slice, starts, stops, self.params["strides"] or (1,) * len(starts)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of a split: the length of each part."""
        return self.params["sizes"]

    @property
    def exponent(self) -> int:
        """Of an integer_pow."""
        return self.params["y"]

    @property
    def preferred_dtype(self) -> np.dtype | None:
        """Of a dot: the dtype that its result was asked for in."""
        return self.params["preferred_element_type"]

    @property
    def is_sharded(self) -> bool:
        """Whether it says that its output is split over devices."""
        found = [self.params.get(name) for name in ("sharding", "out_sharding")]
        return any(axis is not None for held in found if held is not None for axis in getattr(held, "spec", held))

    @property
    def has_program(self) -> bool:
        """Whether it brings a program or function of its own."""
        return any(isinstance(x, jex.Jaxpr | jex.ClosedJaxpr) or callable(x) for x in self.params.values())

    @property
    def gather_axes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Of a gather: per axis of its operand, and per axis of its indices, the axis of its output along which an
        element comes from the same place; what is not named comes from anywhere."""
        numbers, sizes = self.params["dimension_numbers"], self.params["slice_sizes"]
        shape, rank = shape_of(self.inputs[0]), len(shape_of(self.outputs[0]))
        batch = [axis for axis in range(rank) if axis not in numbers.offset_dims]
        of_indices = dict(enumerate(batch))
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        sliced = zip((axis for axis in range(len(shape)) if axis not in gone), numbers.offset_dims, strict=True)
        of_operand = {axis: out for axis, out in sliced if sizes[axis] == shape[axis]}
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        return of_operand | {axis: of_indices[place] for axis, place in pairs}, of_indices

    @property
    def turns(self) -> tuple[int, bool]:
        """Of a scan: how many, and whether from the last to the first."""
        return self.params["length"], self.params["reverse"]

    def differing(self, other: Equation) -> set[str]:
        """Names of the parameters that are not equal, but for programs and functions."""

        def is_plain(value: object) -> bool:
            parts = value if isinstance(value, tuple | list) else (value,)
            return not any(isinstance(x, jex.Jaxpr | jex.ClosedJaxpr) or callable(x) for x in parts)

        pairs = [(name, value, other.params.get(name)) for name, value in self.params.items()]
        return {name for name, a, b in pairs if is_plain(a) and not (a is b or np.all(a == b))}

    @property
    def bodies(self) -> list[jex.ClosedJaxpr]:
        """What a loop runs, or every branch of a conditional; empty for any other primitive."""
        names = {"scan": "jaxpr", "while": "body_jaxpr", "cond": "branches"}
        found = self.params[names[self.name]] if self.name in names else ()
        return list(found) if isinstance(found, tuple | list) else [found]

    def replaced(self, inputs: Sequence[Atom], outputs: Sequence[Variable], **params: object) -> Equation:
        """The same primitive elsewhere; a broadcast or reshape to the shape of its new output."""
        shape = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}.get(self.name)
        params |= {} if shape is None else {shape: outputs[0].aval.shape}
        return Equation(self.primitive, {**self.params, **params}, inputs, outputs)


Rule = Callable[..., list]
"""How an equation is computed: ``rule(equation, *values)`` gives the values of its outputs."""


class Program(NamedTuple):
    """Equations in order, without calls; ``constants`` are the arrays that the traced function closed over."""

    equations: list[Equation]
    inputs: list[Variable]
    outputs: list[Atom]
    constants: dict[Variable, jax.Array]


def is_variable(atom: Atom) -> bool:
    """Whether the atom is a variable rather than a literal."""
    return isinstance(atom, Variable)


def is_in(atom: Atom, known: Collection[Variable]) -> bool:
    """Whether the atom is one of these variables; a literal may have no hash."""
    return isinstance(atom, Variable) and atom in known


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of an atom."""
    return tuple(getattr(atom.aval, "shape", ()))


def variables(atoms: Iterable[Atom]) -> list[Variable]:
    """Those of the atoms that are variables."""
    return [atom for atom in atoms if isinstance(atom, Variable)]


def read_by(equations: Iterable[Equation]) -> list[Variable]:
    """The variables that equations read, as often as they do."""
    return variables(atom for equation in equations for atom in equation.inputs)


def made_by(equations: Iterable[Equation]) -> list[Variable]:
    """The variables that equations compute."""
    return [output for equation in equations for output in equation.outputs]


def backward_slice(
    equations: Sequence[Equation], outputs: Iterable[Atom], stop: Iterable[Variable] = ()
) -> list[Equation]:
    """The equations that ``outputs`` need, not looking behind the variables in ``stop``."""
    stop = set(stop)
    needed = {*variables(outputs)} - stop
    kept = []
    for equation in reversed(equations):
        if any(output in needed for output in equation.outputs):
            kept.append(equation)
            needed |= {*variables(equation.inputs)} - stop
    return kept[::-1]


def dependents(equations: Sequence[Equation], sources: Iterable[Variable]) -> set[Variable]:
    """All variables that depend on one of ``sources``, those included."""
    reached = set(sources)
    for equation in equations:
        if not reached.isdisjoint(variables(equation.inputs)):
            reached.update(equation.outputs)
    return reached


class DotAxes(NamedTuple):
    """The axes of one operand of a ``dot_general``."""

    batch: list[int]
    free: list[int]
    contract: list[int]


def dot_axes(equation: Equation) -> tuple[DotAxes, DotAxes]:
    """The axes of a ``dot_general``'s two operands; its output is ordered (batch, lhs free, rhs free)."""
    contracts, batches = equation.params["dimension_numbers"]
    found = []
    for atom, contract, batch in zip(equation.inputs, contracts, batches, strict=True):
        free = [axis for axis in range(len(shape_of(atom))) if axis not in (*contract, *batch)]
        found.append(DotAxes(list(batch), free, list(contract)))
    return found[0], found[1]


def weights_last(program: Program, moving: Iterable[Variable]) -> Program:
    """``W x`` as ``x W^T`` where x is a vector that moves: for many steps and examples of x, the product is then theirs
    times the weight, in their order, where the other way round it would come out transposed.

    Args:
      moving: inputs that change with the step.
    """
    varying = dependents(program.equations, moving)

    def swapped(equation: Equation) -> Equation:
        if equation.name != "dot_general":
            return equation
        weight, x = equation.inputs
        (lhs, rhs), batch = equation.params["dimension_numbers"]
        is_product = len(shape_of(x)) == 1 and len(rhs) == 1
        if not is_product or not is_in(x, varying) or is_in(weight, varying):
            return equation
        precision = equation.params["precision"]
        precision = precision[::-1] if isinstance(precision, tuple) else precision
        numbers = ((rhs, lhs), batch)
        return equation.replaced([x, weight], equation.outputs, dimension_numbers=numbers, precision=precision)

    return program._replace(equations=[swapped(equation) for equation in program.equations])


def transposed_weight(equation: Equation, transpose: Variable) -> Equation:
    """``x · W^T``, a dot over the first axis of x and the second of W, as one with the transpose in W's place."""
    return equation.replaced(
        [equation.inputs[0], transpose], equation.outputs, dimension_numbers=(((0,), (0,)), ((), ()))
    )


def slice_of(atom: Atom, window: Sequence[tuple[int, int]]) -> Equation:
    """A new variable that is a block of a value; start and stop on every axis."""
    starts, stops = zip(*window, strict=True)
    part = Variable(jax.ShapeDtypeStruct(tuple(b - a for a, b in window), atom.aval.dtype))
    params = {"start_indices": starts, "limit_indices": stops, "strides": None}
    return Equation(jax.lax.slice_p, params, [atom], [part])


def squeezed(atom: Atom, axis: int) -> Equation:
    """A new variable that is a value without an axis of length one."""
    shape = shape_of(atom)
    part = Variable(jax.ShapeDtypeStruct((*shape[:axis], *shape[axis + 1 :]), atom.aval.dtype))
    return Equation(jax.lax.squeeze_p, {"dimensions": (axis,)}, [atom], [part])
