"""Values of a cell's program inside a segment, which have only those axes of the segment that they depend on.

The axes are, in this order: ``c``, the step in the segment; ``r``, the row of a trace that a cotangent starts from;
``b``, the example. What depends on parameters alone has none of them, so a product with a weight is one matrix product
for all steps, rows and examples, and what does not depend on the example is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.primitives import SAME_SHAPE
from deepeprop_jax.jaxpr.program import Atom, Equation, Literal, Variable, backward_slice, bind, is_variable, shape_of

AXES = "crb"

Rule = Callable[..., list[Any]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["axes"])
class Lifted:
    """An array whose leading axes are those named in ``axes``, a subsequence of ``"crb"``; the rest is the value's."""

    __slots__ = ("axes", "value")

    def __init__(self, value: Any, axes: str = ""):
        self.value, self.axes = value, axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape behind the leading axes."""
        return jnp.shape(self.value)[len(self.axes) :]

    def map(self, function: Callable[[Any], Any]) -> Lifted:
        """A function of the array that keeps the leading axes."""
        return Lifted(function(self.value), self.axes)

    def flat(self) -> Lifted:
        """The value as a vector."""
        return self.map(lambda value: value.reshape(*value.shape[: len(self.axes)], -1))


Leaves = list[Lifted | None]
"""Values of some real leaves, such as their cotangents; None is a zero."""


def union(*axes: str) -> str:
    """All axes that appear, in order."""
    return "".join(axis for axis in AXES if any(axis in given for given in axes))


def aligned(x: Lifted, axes: str) -> Any:
    """The array with all of ``axes``, of size 1 where it lacks one."""
    shape = iter(x.value.shape[: len(x.axes)])
    return x.value.reshape(*(next(shape) if axis in x.axes else 1 for axis in axes), *x.shape)


def broadcast(x: Lifted, axes: str, sizes: Mapping[str, int]) -> Any:
    """The array with all of ``axes``, in full."""
    return jnp.broadcast_to(aligned(x, axes), (*(sizes[axis] for axis in axes), *x.shape))


def elementwise(function: Callable[..., Any], *operands: Lifted) -> Lifted:
    """An element-wise function of values of one shape."""
    axes = union(*(x.axes for x in operands))
    return Lifted(function(*(aligned(x, axes) for x in operands)), axes)


def add(*terms: Lifted | None) -> Lifted | None:
    """Sum of the terms that are there; None stands for zero."""
    present = [term for term in terms if term is not None]
    return functools.reduce(lambda a, b: elementwise(jnp.add, a, b), present) if present else None


def apply(equation: Equation, operands: Sequence[Lifted], rule: Rule = bind) -> list[Lifted]:
    """An equation under ``vmap`` over those axes that any operand has."""
    axes = union(*(x.axes for x in operands))
    wide = [x for x in operands if jnp.ndim(x.value)]
    if equation.name in SAME_SHAPE and all(x.shape == wide[0].shape for x in wide):
        # What vmap would do, in a fraction of the time that it takes to trace.
        sizes = {axis: size for x in wide for axis, size in zip(x.axes, x.value.shape, strict=False)}
        full = [broadcast(x, axes, sizes) if jnp.ndim(x.value) and x.axes != axes else x.value for x in operands]
        return [Lifted(value, axes) for value in bind(equation, *full)]

    def function(*values: Any) -> list[Any]:
        return rule(equation, *values)

    for axis in reversed(axes):
        function = jax.vmap(function, in_axes=tuple(0 if axis in x.axes else None for x in operands))
    return [Lifted(value, axes) for value in function(*(x.value for x in operands))]


class Values:
    """Values of a program's variables, computed when asked for and kept.

    Attributes:
      known: what is known so far.
    """

    def __init__(self, equations: Sequence[Equation], known: Mapping[Variable, Lifted]):
        self.equations, self.known = equations, dict(known)

    def get(self, atoms: Iterable[Atom]) -> list[Lifted]:
        """Values of atoms."""
        atoms = list(atoms)
        for equation in backward_slice(self.equations, atoms, self.known):
            results = apply(equation, [self.read(atom) for atom in equation.inputs])
            for variable, value in zip(equation.outputs, results, strict=True):
                self.known.setdefault(variable, value)
        return [self.read(atom) for atom in atoms]

    def read(self, atom: Atom) -> Lifted:
        """The value of an atom that is known."""
        return Lifted(atom.val) if isinstance(atom, Literal) else self.known[atom]


def pull(
    equations: Sequence[Equation],
    cotangents: Mapping[Variable, Lifted],
    linear: set[Variable],
    read: Callable[[Atom], Lifted],
    outputs: Sequence[Atom],
    rule: Rule = bind,
) -> list[Lifted | None]:
    """Run equations that are linear in a cotangent; None is a zero, and nothing is computed for it.

    Args:
      equations: in order.
      cotangents: the linear variables that are known.
      linear: all variables that depend on the cotangent.
      read: the value of any other atom.
    """
    found: dict[Variable, Lifted] = dict(cotangents)

    def value(atom: Atom) -> Lifted | None:
        if isinstance(atom, Literal):
            return Lifted(atom.val)
        return found.get(atom) if atom in linear else read(atom)

    for equation in equations:
        operands = [value(atom) for atom in equation.inputs]
        zero = [x is None for x in operands]
        alive = [
            x
            for x, atom in zip(operands, equation.inputs, strict=True)
            if x is not None and is_variable(atom) and atom in linear
        ]
        if not alive:
            continue
        if equation.name in ("add_any", "add") and any(zero):
            results = alive
        else:
            pairs = zip(operands, equation.inputs, strict=True)
            filled = [Lifted(jnp.zeros(shape_of(a), a.aval.dtype)) if x is None else x for x, a in pairs]
            results = apply(equation, filled, rule)
        for variable, result in zip(equation.outputs, results, strict=True):
            found.setdefault(variable, result)
    return [None if isinstance(atom, Literal) else found.get(atom) for atom in outputs]


class Steps(NamedTuple):
    """What a reverse loop over the steps of a segment reads: slices of what has the axis c, the rest as it stands.

    Attributes:
      slices: arrays with a leading axis c.
      at: turns a step's slices into the tree of values.
    """

    slices: list[Any]
    at: Callable[[list[Any]], Any]


def per_step(tree: Any) -> Steps:
    """Split a pytree of ``Lifted`` for a ``lax.scan`` over c."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Lifted))
    moving = ["c" in x.axes for x in leaves]

    def at(slices: list[Any]) -> Any:
        rest = iter(slices)
        values = [Lifted(next(rest), x.axes[1:]) if m else x for x, m in zip(leaves, moving, strict=True)]
        return jax.tree.unflatten(structure, values)

    return Steps([x.value for x, m in zip(leaves, moving, strict=True) if m], at)


def scan_back(body: Callable, start: Any, tree: Any, length: int) -> Any:
    """``lax.scan`` from the last step of a segment to the first: ``body(carry, values of the step)``."""
    steps = per_step(tree)
    return lax.scan(lambda carry, slices: body(carry, steps.at(slices)), start, steps.slices, length, reverse=True)
