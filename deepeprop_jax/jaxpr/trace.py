"""Functions traced to flat programs; the only file that knows what a jaxpr looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import evaluate
from deepeprop_jax.jaxpr.primitives import CALLS, CUSTOM_RULES
from deepeprop_jax.jaxpr.program import Atom, Equation, Literal, Program, Variable, shape_of

_SETTINGS = (
    "jax_allow_f16_reductions", "jax_debug_infs", "jax_debug_nans", "jax_default_matmul_precision",
    "jax_default_prng_impl", "jax_disable_jit", "jax_enable_custom_prng", "jax_enable_x64", "jax_explicit_x64_dtypes",
    "jax_legacy_prng_key", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_random_seed_offset",
    "jax_softmax_custom_jvp", "jax_threefry_partitionable",
)  # fmt: skip
"""What a user may set for a while, and a traced program then keeps."""


def context() -> tuple[object, ...]:
    """The settings in force that a traced program depends on; equal programs may be used again only in the same."""
    return (jax.sharding.get_abstract_mesh(), *(getattr(jax.config, name, None) for name in _SETTINGS))


def trace(function: Callable, *args: object, differentiated: bool = False) -> Program:
    """The flat program of ``function``; arguments may be arrays or ``jax.ShapeDtypeStruct``, leaves in pytree order.

    Args:
      differentiated: whether derivatives have been taken in it, so that custom rules are no longer needed.
    """
    return _flat(jax.make_jaxpr(function)(*args), CALLS | CUSTOM_RULES if differentiated else CALLS)


def _flat(closed: jex.ClosedJaxpr, inlined: dict[str, str]) -> Program:
    equations: list[Equation] = []
    constants: dict[Variable, jax.Array] = {}

    def walk(closed: jex.ClosedJaxpr, args: Sequence[Atom]) -> list[Atom]:
        # From JAX 0.12 on a jaxpr is closed by itself; before, the closed one wraps the open one.
        jaxpr, values = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        environment: dict[jex.Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, values, strict=True):
            environment[var] = Variable(var.aval)
            constants[environment[var]] = value

        def read(atom: jex.Var | Literal) -> Atom:
            return atom if isinstance(atom, Literal) else environment[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in inlined:
                outputs = walk(eqn.params[inlined[eqn.primitive.name]], inputs)
            elif _says_nothing(eqn):
                outputs = inputs
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


def _says_nothing(eqn: jex.JaxprEqn) -> bool:
    """Whether it only forgets a mesh: ``jax.vjp`` inside ``shard_map`` does, for arguments that are shapes."""
    return eqn.primitive.name == "reshard" and eqn.params["dst_sharding"].mesh.empty


def inner_programs(equation: Equation) -> list[Program]:
    """What an equation brings of programs, as they stand: a loop's, every branch of a conditional, a custom rule's."""
    values = [value for _, value in sorted(equation.params.items())]
    parts = [x for value in values for x in (value if isinstance(value, tuple | list) else (value,))]
    return [_flat(part, CALLS) for part in parts if isinstance(part, jex.Jaxpr | jex.ClosedJaxpr)]


def check_custom_rules(function: Callable, *args: object) -> None:
    """Differentiate a function's program once if custom rules stand in it: one that reads a traced value from elsewhere
    than its arguments fails only there, as in ``jax.grad`` through a scan, with an ``UnexpectedTracerError`` by JAX.
    """
    program = trace(function, *args)
    if not _has_custom_rule(program.equations):
        return
    leaves = jax.tree.leaves(args)
    free = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def pull(leaves: list[jax.Array]) -> list[jax.Array]:
        def of_free(values: list[jax.Array]) -> list[jax.Array]:
            known = dict(zip(program.inputs, leaves, strict=True))
            known |= {program.inputs[i]: value for i, value in zip(free, values, strict=True)}
            results = evaluate(program.equations, program.constants | known, program.outputs)
            return [result for result in results if jnp.issubdtype(jnp.result_type(result), jnp.inexact)]

        results, pull = jax.vjp(of_free, [leaves[i] for i in free])
        return pull([jnp.ones_like(result) for result in results])

    trace(pull, leaves)


def _has_custom_rule(equations: Iterable[Equation]) -> bool:
    """Whether a ``custom_jvp`` or ``custom_vjp`` function is called in equations, a jaxpr's too, at any depth."""
    for equation in equations:
        if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            return True
        params = equation.params.values()
        inner = [x for value in params for x in (value if isinstance(value, tuple | list) else [value])]
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
    """None for an equation that runs no program.

    How many values are fixed and carried, the shapes tell: what stands among the parameters differs from one JAX to
    another. A loop's body takes what is fixed, what is carried and, in a scan, slices of the rest, in this order.
    """
    programs = [_flat(body, CALLS | CUSTOM_RULES) for body in equation.bodies]
    if not programs:
        return None
    if equation.name == "cond":
        return Inside(programs, [], [], 0)

    def same(outside: Sequence[Atom], inside: Sequence[Atom]) -> int:
        return sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(outside, inside, strict=True))

    body, count, fixed = programs[0], len(equation.outputs), 0
    first, start = len(body.inputs) - count, len(equation.inputs) - count
    if equation.name == "scan":
        count = same(equation.outputs, body.outputs)
        first = start = fixed = same(equation.inputs, body.inputs) - count
    return Inside(programs, [(first + i, i) for i in range(count)], [start + i for i in range(count)], fixed)
