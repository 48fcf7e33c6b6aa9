"""Programs computed: on plain values, and on those of a segment, with just the axes of it that they depend on.

The axes are, in this order: ``c``, the step in the segment; ``r``, the row of a trace that a cotangent starts from;
``b``, the example. What depends on parameters alone has none of them, so a product with a weight is one matrix product
for all steps, rows and examples, and what does not depend on the example is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.mesh_axes import vary, vary_like, varying_axes
from deepeprop_jax.jaxpr.primitives import SAME_SHAPE
from deepeprop_jax.jaxpr.program import Atom, Equation, Literal, Rule, Variable, backward_slice, is_in, shape_of

T = TypeVar("T")
Tree = TypeVar("Tree")
Carry = TypeVar("Carry")
Output = TypeVar("Output")


def bind(equation: Equation, *values: jax.Array) -> list[jax.Array]:
    """Apply an equation's primitive to values."""
    values = tuple(_varying_alike(equation, values))
    params = equation.primitive.get_bind_params(equation.params)
    if isinstance(params, tuple):  # (functions, params) in older JAX
        result = equation.primitive.bind(*params[0], *values, **params[1])
    else:
        result = equation.primitive.bind(*values, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _varying_alike(equation: Equation, values: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Operands of types that vary along the axes of a mesh that they varied along when the equation was traced.

    Those of a primitive that brings no program of its own have to vary along the same ones.
    """
    axes = varying_axes(*values)
    if not axes:
        return values
    if not equation.has_program:
        return [vary(value, axes) for value in values]
    return [vary_like(value, atom.aval) for value, atom in zip(values, equation.inputs, strict=True)]


def evaluate(
    equations: Sequence[Equation], environment: Mapping[Variable, T], outputs: Sequence[Atom], rule: Rule = bind
) -> list[T]:
    """Run equations over values.

    A variable that ``environment`` already holds keeps its value, also where an equation needed for another of its
    outputs would compute it again.
    """
    known = dict(environment)

    def read(atom: Atom) -> T:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in equations:
        values = rule(equation, *map(read, equation.inputs))
        for variable, value in zip(equation.outputs, values, strict=True):
            known.setdefault(variable, value)
    return list(map(read, outputs))


# --- values of a segment ---------------------------------------------------------------------------------------------

AXES = "crb"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["axes"])
class Lifted:
    """An array whose leading axes are those named in ``axes``, a subsequence of ``"crb"``; the rest is the value's."""

    __slots__ = ("axes", "value")

    def __init__(self, value: jax.Array, axes: str = ""):
        self.value, self.axes = value, axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape behind the leading axes."""
        return jnp.shape(self.value)[len(self.axes) :]

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Lifted:
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


def aligned(x: Lifted, axes: str) -> jax.Array:
    """The array with all of ``axes``, of size 1 where it lacks one."""
    shape = iter(x.value.shape[: len(x.axes)])
    return x.value.reshape(*(next(shape) if axis in x.axes else 1 for axis in axes), *x.shape)


def broadcast(x: Lifted, axes: str, sizes: Mapping[str, int]) -> jax.Array:
    """The array with all of ``axes``, in full."""
    return jnp.broadcast_to(aligned(x, axes), (*(sizes[axis] for axis in axes), *x.shape))


def elementwise(function: Callable[..., jax.Array], *operands: Lifted) -> Lifted:
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

    function = functools.partial(rule, equation)
    for axis in reversed(axes):
        function = jax.vmap(function, in_axes=tuple(0 if axis in x.axes else None for x in operands))
    return [Lifted(value, axes) for value in function(*(x.value for x in operands))]


class Values:
    """Values of a program's variables, computed when asked for and kept in ``known``."""

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
      cotangents: the linear variables that are known.
      linear: all variables that depend on the cotangent; ``read`` gives the value of any other atom.
    """
    found: dict[Variable, Lifted] = dict(cotangents)

    def value(atom: Atom) -> Lifted | None:
        if isinstance(atom, Literal):
            return Lifted(atom.val)
        return found.get(atom) if atom in linear else read(atom)

    for equation in equations:
        operands = [(atom, value(atom)) for atom in equation.inputs]
        alive = [x for atom, x in operands if x is not None and is_in(atom, linear)]
        if not alive:
            continue
        if equation.name in ("add_any", "add") and any(x is None for _, x in operands):
            results = alive
        else:
            filled = [Lifted(jnp.zeros(shape_of(a), a.aval.dtype)) if x is None else x for a, x in operands]
            results = apply(equation, filled, rule)
        for variable, result in zip(equation.outputs, results, strict=True):
            found.setdefault(variable, result)
    return [None if isinstance(atom, Literal) else found.get(atom) for atom in outputs]


def scan_back(
    body: Callable[[Carry, Tree], tuple[Carry, Output]], start: Carry, tree: Tree, length: int
) -> tuple[Carry, Output]:
    """``lax.scan`` from the last step of a segment to the first: ``body(carry, values of the step)``.

    Args:
      tree: of ``Lifted``; each step gets slices of what has the axis c, and the rest as it stands.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Lifted))

    def step(carry: Carry, slices: list[jax.Array]) -> tuple[Carry, Output]:
        rest = iter(slices)
        values = [Lifted(next(rest), x.axes[1:]) if "c" in x.axes else x for x in leaves]
        return body(carry, jax.tree.unflatten(structure, values))

    return scan(step, start, [x.value for x in leaves if "c" in x.axes], length, reverse=True)


def scan(
    body: Callable[[Carry, Tree], tuple[Carry, Output]], start: Carry, xs: Tree, length: int, reverse: bool = False
) -> tuple[Carry, Output]:
    """``lax.scan`` over the steps of a segment; of one step without a loop, which XLA would first compile."""
    if length > 1:
        return lax.scan(body, start, xs, length, reverse)
    end, found = body(start, jax.tree.map(lambda leaf: lax.squeeze(leaf, (0,)), xs))
    return end, jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), found)
