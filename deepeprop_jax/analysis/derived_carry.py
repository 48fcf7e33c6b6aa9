"""Carry leaves that are functions of others: z_t = Z(v_t, a_t), unit by unit, as a spike is of its membrane potential.

S^z_t = dZ/dv S^v_t + dZ/da S^a_t holds at every step, so such a leaf needs no trace. Its value is carried as it is; its
derivative is taken through Z where it is read. The gradient stays the same in every mode: D is cut to units, and Z
never leaves a unit. One slot less in a trace, and in exact mode so many rows less.

Z is then differentiated at the first carry too, which no step has made: 0 times an infinite slope would be NaN there.
Where the slope may be infinite for a finite carry (a square root, a quotient that is not known to stay away from 0) the
leaf keeps its trace; what is left, overflow and infinite first carries, has slope 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from deepeprop_jax.analysis.labels import Labels, depends_on
from deepeprop_jax.jaxpr.batched import evaluate
from deepeprop_jax.jaxpr.bounds import has_finite_slope
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    is_variable,
    made_by,
    read_by,
)
from deepeprop_jax.jaxpr.real_leaves import Kind, RealView
from deepeprop_jax.jaxpr.trace import trace

T = TypeVar("T")


class Derived(NamedTuple):
    """A carry leaf that the others determine.

    Attributes:
      leaf: its index among the carry's leaves.
      sources: those that it is computed from and moves with, their variables and indices.
      fixed: likewise those without a derivative, integers and keys.
      equations: Z.
      value: what Z computes.
    """

    leaf: int
    sources: dict[Variable, int]
    fixed: dict[Variable, int]
    equations: list[Equation]
    value: Atom


def derived_leaves(program: Program, carry_atoms: Sequence[Atom], view: RealView) -> list[Derived]:
    """Which real leaves of a cell's new carry are unit-local functions of its other real leaves of their shape.

    Constants may enter, and integers and keys of the new carry; parameters, input and old carry may not. In the order
    of what is returned no leaf is computed from one before it: they are to be computed from last to first.
    """
    found: list[Derived] = []
    made_of = {i: atom for i, atom in enumerate(carry_atoms) if is_variable(atom)}
    fixed = {atom: i for i, atom in made_of.items() if view.kinds[i] is Kind.OTHER}
    for leaf, atom in reversed(made_of.items()):
        shape = view.avals[leaf].shape
        if view.kinds[leaf] is not Kind.REAL or not shape:
            continue
        gone = {leaf, *(d.leaf for d in found)}
        rest = {i: a for i, a in made_of.items() if i not in gone and view.kinds[i] is Kind.REAL}
        sources = {a: i for i, a in rest.items() if view.avals[i].shape == shape}
        equations = backward_slice(program.equations, [atom], {*sources, *fixed})
        read = {*read_by(equations), atom}
        used, used_fixed = ({v: i for v, i in group.items() if v in read} for group in (sources, fixed))
        if used and read <= {*made_by(equations), *program.constants, *used, *used_fixed}:
            derived = Derived(leaf, used, used_fixed, equations, atom)
            vjp = _vjp(derived, program)
            if _is_local(vjp, shape) and has_finite_slope(vjp):
                found.append(derived)
    return found


def _vjp(derived: Derived, program: Program) -> Program:
    """``(sources, fixed, cotangent of Z) -> cotangents of the sources``."""

    def pull(sources: list[jax.Array], fixed: list[jax.Array], ct: jax.Array) -> list[jax.Array]:
        return jax.vjp(partial(_evaluate, derived, program.constants, fixed), sources)[1](ct)[0]

    avals = [[variable.aval for variable in group] for group in (derived.sources, derived.fixed)]
    return trace(pull, *avals, derived.value.aval)


def _evaluate(
    derived: Derived, constants: dict[Variable, jax.Array], fixed: list[jax.Array], sources: list[jax.Array]
) -> jax.Array:
    """Z."""
    known = constants | dict(zip(derived.sources, sources, strict=True)) | dict(zip(derived.fixed, fixed, strict=True))
    return evaluate(derived.equations, known, [derived.value])[0]


def _is_local(vjp: Program, shape: tuple[int, ...]) -> bool:
    """Whether labels say that an entry of Z depends on the same entry of its sources alone."""
    units = np.arange(int(np.prod(shape))).reshape(shape)
    flow = depends_on(vjp.equations, {vjp.inputs[-1]: Labels.of(units)})
    return flow.within(vjp.outputs, [units] * len(vjp.outputs))


def through_sources(
    derived: Sequence[Derived], constants: dict[Variable, jax.Array], leaves: Sequence[T], point: Sequence[T]
) -> list[T]:
    """The leaves of a carry as they are, where those that are derived move as Z does when the others leave ``point``.

    Where a slope of Z is not finite it counts as 0. ``point`` has the same values, but is not what F or g is
    differentiated by. Whoever differentiates once more, by what the whole carry depends on, moves both: then a derived
    leaf moves with its own value, and the slopes with ``point``.
    """
    leaves, point = list(leaves), list(point)
    for d in reversed(derived):  # each is read only after what it is derived from
        sources, base = ([values[i] for i in d.sources.values()] for values in (leaves, point))
        fixed = [leaves[i] for i in d.fixed.values()]
        made, pull = jax.vjp(partial(_evaluate, d, constants, fixed), base)
        slopes = [jnp.where(jnp.isfinite(slope), slope, 0) for slope in pull(jnp.ones_like(made))[0]]
        leaves[d.leaf] = _moving(leaves[d.leaf], slopes, sources, base)
    return leaves


@jax.custom_jvp
def _moving(value: jax.Array, slopes: list[jax.Array], sources: list[jax.Array], base: list[jax.Array]) -> jax.Array:
    """``value + slopes · (sources - base)``, entry by entry, where sources and base are equal."""
    return value


def _moving_jvp(primals: tuple, tangents: tuple) -> tuple:
    value, slopes, _, _ = primals
    moved, _, sources, base = tangents
    terms = [] if isinstance(moved, SymbolicZero) else [moved]
    for slope, source, start in zip(slopes, sources, base, strict=True):
        terms += [] if isinstance(source, SymbolicZero) else [(slope * source).astype(value.dtype)]
        terms += [] if isinstance(start, SymbolicZero) else [(-slope * start).astype(value.dtype)]
    return value, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(value)


_moving.defjvp(_moving_jvp, symbolic_zeros=True)
