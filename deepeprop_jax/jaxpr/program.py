"""The only file that touches jaxprs: trace a function to a flat program, slice it, evaluate it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from deepeprop_jax.jaxpr.mesh_axes import vary, vary_like, varying_axes
from deepeprop_jax.jaxpr.primitives import CALLS, CUSTOM_RULES

Literal = jex.Literal


_SETTINGS = (
    "jax_allow_f16_reductions", "jax_debug_infs", "jax_debug_nans", "jax_default_matmul_precision",
    "jax_default_prng_impl", "jax_disable_jit", "jax_enable_custom_prng", "jax_enable_x64", "jax_explicit_x64_dtypes",
    "jax_legacy_prng_key", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_random_seed_offset",
    "jax_softmax_custom_jvp", "jax_threefry_partitionable",
)  # fmt: skip
"""What a user may set for a while, and a traced program then keeps."""


def context() -> tuple[Any, ...]:
    """The settings in force that a traced program depends on; equal programs may be used again only in the same."""
    return (jax.sharding.get_abstract_mesh(), *(getattr(jax.config, name, None) for name in _SETTINGS))


class Variable:
    """A value of a flat program; every call of an inlined function gets variables of its own."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval


Atom = Any
"""A ``Variable`` or a ``Literal``."""


class Equation:
    """One primitive applied to atoms."""

    __slots__ = ("inputs", "outputs", "params", "primitive")

    def __init__(self, primitive: jex.Primitive, params: dict, inputs: list[Atom], outputs: list[Variable]):
        self.primitive, self.params, self.inputs, self.outputs = primitive, params, inputs, outputs

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


class Program(NamedTuple):
    """Equations in order, without calls; ``constants`` are the arrays that the traced function closed over."""

    equations: list[Equation]
    inputs: list[Variable]
    outputs: list[Atom]
    constants: dict[Variable, Any]


def trace(function: Callable, *args: Any, differentiated: bool = False) -> Program:
    """The flat program of ``function``; arguments may be arrays or ``jax.ShapeDtypeStruct``, leaves in pytree order.

    Args:
      differentiated: whether derivatives have been taken in it, so that custom rules are no longer needed.
    """
    return _flat(jax.make_jaxpr(function)(*args), CALLS | CUSTOM_RULES if differentiated else CALLS)


def _flat(closed: Any, inlined: dict[str, str]) -> Program:
    equations: list[Equation] = []
    constants: dict[Variable, Any] = {}

    def walk(closed: Any, args: list[Atom]) -> list[Atom]:
        # From JAX 0.12 on a jaxpr is closed by itself; before, the closed one wraps the open one.
        jaxpr, values = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        environment: dict[Any, Atom] = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, values, strict=True):
            environment[var] = Variable(var.aval)
            constants[environment[var]] = value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, Literal) else environment[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in inlined:
                outputs = walk(eqn.params[inlined[eqn.primitive.name]], inputs)
            else:
                outputs = [Variable(var.aval) for var in eqn.outvars]
                equations.append(Equation(eqn.primitive, eqn.params, inputs, outputs))
            environment.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = [Variable(var.aval) for var in getattr(closed, "jaxpr", closed).invars]
    program = Program(equations, inputs, walk(closed, inputs), constants)
    for value in constants.values():
        if isinstance(value, jax.core.Tracer):
            jax.lax.optimization_barrier(value)  # one of a trace that is over raises here, not where the program is run
    return program


def check_custom_rules(function: Callable, *args: Any) -> None:
    """Differentiate a function's program once if custom rules stand in it: one that reads a traced value from elsewhere
    than its arguments fails only there, as in ``jax.grad`` through a scan.

    Args:
      function: of pytrees.
      args: with ``jax.ShapeDtypeStruct`` leaves.

    Raises:
      jax.errors.UnexpectedTracerError: by JAX, for such a rule.
    """
    program = trace(function, *args)
    if not _has_custom_rule(program.equations):
        return
    leaves = jax.tree.leaves(args)
    free = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def pull(leaves: list[Any]) -> list[Any]:
        def of_free(values: list[Any]) -> list[Any]:
            known = dict(zip(program.inputs, leaves, strict=True))
            known |= {program.inputs[i]: value for i, value in zip(free, values, strict=True)}
            results = evaluate(program.equations, program.constants | known, program.outputs)
            return [result for result in results if jnp.issubdtype(jnp.result_type(result), jnp.inexact)]

        results, pull = jax.vjp(of_free, [leaves[i] for i in free])
        return pull([jnp.ones_like(result) for result in results])

    trace(pull, leaves)


def _has_custom_rule(equations: Iterable[Any]) -> bool:
    """Whether a ``custom_jvp`` or ``custom_vjp`` function is called in equations, at any depth."""
    for equation in equations:
        primitive: Any = equation.primitive
        if primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            return True
        inner = [
            x for value in equation.params.values() for x in (value if isinstance(value, tuple | list) else [value])
        ]
        if any(_has_custom_rule(getattr(getattr(x, "jaxpr", x), "eqns", ())) for x in inner):
            return True
    return False


class Inside(NamedTuple):
    """What a loop or a conditional runs, differentiated.

    Attributes:
      programs: the body of a loop, or every branch.
      carried: (input, output) of the body that are one value from turn to turn.
      start: which of the equation's inputs those values start from.
      fixed: how many inputs, of the equation and of the body, are the same at every turn: they come first.
    """

    programs: list[Program]
    carried: list[tuple[int, int]]
    start: list[int]
    fixed: int


def inside(equation: Equation) -> Inside | None:
    """None for an equation that runs no program."""
    params = equation.params
    if equation.name == "scan":
        return _inside_scan(equation)
    if equation.name == "while":
        bodies, first, before = [params["body_jaxpr"]], params["body_nconsts"], params["cond_nconsts"]
        count = len(equation.outputs)
    elif equation.name == "cond":
        bodies, first, count, before = list(params["branches"]), 0, 0, 0
    else:
        return None
    programs = [_flat(body, CALLS | CUSTOM_RULES) for body in bodies]
    turns = range(count)
    return Inside(programs, [(first + i, i) for i in turns], [before + first + i for i in turns], 0)


def _inside_scan(equation: Equation) -> Inside:
    """Its body takes what is fixed, what is carried and slices of the rest, in this order.

    How many of each, the shapes tell: what stands among the parameters differs from one JAX to another.
    """
    body = _flat(equation.params["jaxpr"], CALLS | CUSTOM_RULES)

    def same(outside: Sequence[Atom], inside: Sequence[Atom]) -> int:
        return sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(outside, inside, strict=True))

    carried = same(equation.outputs, body.outputs)
    fixed = same(equation.inputs, body.inputs) - carried
    places = [fixed + i for i in range(carried)]
    return Inside([body], list(zip(places, range(carried), strict=True)), places, fixed)


def is_variable(atom: Atom) -> bool:
    """Whether the atom is a variable rather than a literal."""
    return isinstance(atom, Variable)


def backward_slice(
    equations: Sequence[Equation], outputs: Iterable[Atom], stop: Iterable[Variable] = ()
) -> list[Equation]:
    """The equations that ``outputs`` need, not looking behind the variables in ``stop``."""
    stop = set(stop)
    needed = {atom for atom in outputs if is_variable(atom)} - stop
    kept = []
    for equation in reversed(equations):
        if any(output in needed for output in equation.outputs):
            kept.append(equation)
            needed |= {atom for atom in equation.inputs if is_variable(atom)} - stop
    return kept[::-1]


def dependents(equations: Sequence[Equation], sources: Iterable[Variable]) -> set[Variable]:
    """All variables that depend on one of ``sources``, those included."""
    reached = set(sources)
    for equation in equations:
        if any(is_variable(atom) and atom in reached for atom in equation.inputs):
            reached.update(equation.outputs)
    return reached


def bind(equation: Equation, *values: Any) -> list[Any]:
    """Apply an equation's primitive to values."""
    values = tuple(_varying_alike(equation, values))
    params = equation.primitive.get_bind_params(equation.params)
    if isinstance(params, tuple):  # (functions, params) in older JAX
        result = equation.primitive.bind(*params[0], *values, **params[1])
    else:
        result = equation.primitive.bind(*values, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _varying_alike(equation: Equation, values: Sequence[Any]) -> Sequence[Any]:
    """Operands of types that vary along the axes of a mesh that they varied along when the equation was traced.

    Those of a primitive that brings no program of its own have to vary along the same ones.
    """
    axes = varying_axes(*values)
    if not axes:
        return values
    if not any(isinstance(value, jex.Jaxpr | jex.ClosedJaxpr) or callable(value) for value in equation.params.values()):
        return [vary(value, axes) for value in values]
    return [vary_like(value, atom.aval) for value, atom in zip(values, equation.inputs, strict=True)]


def evaluate(
    equations: Sequence[Equation],
    environment: dict[Variable, Any],
    outputs: Sequence[Atom],
    rule: Callable[..., list[Any]] = bind,
) -> list[Any]:
    """Run equations over values; ``rule(equation, *values)`` may replace how one is computed.

    A variable that ``environment`` already holds keeps its value, also where an equation needed for another of its
    outputs would compute it again.
    """
    environment = dict(environment)

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else environment[atom]

    for equation in equations:
        values = rule(equation, *[read(atom) for atom in equation.inputs])
        for variable, value in zip(equation.outputs, values, strict=True):
            environment.setdefault(variable, value)
    return [read(atom) for atom in outputs]


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of an atom."""
    return tuple(getattr(atom.aval, "shape", ()))


class DotAxes(NamedTuple):
    """Which axes of the two operands of a ``dot_general`` are contracted, batched and free."""

    lhs_contract: list[int]
    rhs_contract: list[int]
    lhs_batch: list[int]
    rhs_batch: list[int]
    lhs_free: list[int]
    rhs_free: list[int]


def dot_axes(equation: Equation) -> DotAxes:
    """The axes of a ``dot_general`` equation; its output is ordered (batch, lhs free, rhs free)."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]

    def free(atom: Atom, *used: Sequence[int]) -> list[int]:
        return [axis for axis in range(len(shape_of(atom))) if all(axis not in axes for axes in used)]

    return DotAxes(
        list(lhs_contract),
        list(rhs_contract),
        list(lhs_batch),
        list(rhs_batch),
        free(equation.inputs[0], lhs_contract, lhs_batch),
        free(equation.inputs[1], rhs_contract, rhs_batch),
    )


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
        if (is_variable(weight) and weight in varying) or not (is_variable(x) and x in varying):
            return equation
        (lhs, rhs), batch = equation.params["dimension_numbers"]
        if len(shape_of(x)) != 1 or len(rhs) != 1:
            return equation
        precision = equation.params["precision"]
        precision = precision[::-1] if isinstance(precision, tuple) else precision
        params = {**equation.params, "dimension_numbers": ((rhs, lhs), batch), "precision": precision}
        return Equation(equation.primitive, params, [x, weight], equation.outputs)

    return program._replace(equations=[swapped(equation) for equation in program.equations])
