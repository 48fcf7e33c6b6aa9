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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from deepeprop_jax.analysis import labels
from deepeprop_jax.jaxpr.bounds import has_finite_slope
from deepeprop_jax.jaxpr.program import Atom, Equation, Program, Variable, backward_slice, evaluate, is_variable, trace
from deepeprop_jax.jaxpr.real_leaves import RealView


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

    Constants may enter, and integers and keys of the new carry; parameters, input and old carry may not.

    Args:
      program: the cell's, for one example.
      carry_atoms: the leaves of the new carry in it.
      view: of the carry.

    Returns:
      In an order in which no leaf is computed from one before it, so that they are to be computed from last to first.
    """
    found: list[Derived] = []
    shapes, constants = [aval.shape for aval in view.avals], set(program.constants)
    for leaf in reversed(range(len(carry_atoms))):
        atom = carry_atoms[leaf]
        if view.kinds[leaf] != "real" or not is_variable(atom) or not shapes[leaf]:
            continue
        gone = {leaf, *(d.leaf for d in found)}
        rest = [
            i
            for i in range(len(carry_atoms))
            if i not in gone and view.kinds[i] == "real" and shapes[i] == shapes[leaf]
        ]
        sources = {carry_atoms[i]: i for i in rest if is_variable(carry_atoms[i])}
        without = [i for i, kind in enumerate(view.kinds) if kind == "other" and is_variable(carry_atoms[i])]
        fixed = {carry_atoms[i]: i for i in without}
        equations = backward_slice(program.equations, [atom], {*sources, *fixed})
        made = {output for equation in equations for output in equation.outputs} | constants
        read = {a for e in equations for a in e.inputs if is_variable(a)} | {atom}
        used, fixed = ({v: i for v, i in group.items() if v in read} for group in (sources, fixed))
        if used and read <= made | {*used, *fixed}:
            derived = Derived(leaf, used, fixed, equations, atom)
            vjp = _vjp(derived, program)
            if _is_local(vjp, shapes[leaf]) and has_finite_slope(vjp):
                found.append(derived)
    return found


def _vjp(derived: Derived, program: Program) -> Program:
    """``(sources, fixed, cotangent of Z) -> cotangents of the sources``."""

    def pull(sources: list[jax.Array], fixed: list[jax.Array], ct: jax.Array) -> list[jax.Array]:
        return jax.vjp(partial(_evaluate, derived, program.constants, fixed), sources)[1](ct)[0]

    avals = [[variable.aval for variable in group] for group in (derived.sources, derived.fixed)]
    return trace(pull, *avals, derived.value.aval)


def _evaluate(
    derived: Derived, constants: dict[Variable, Any], fixed: list[jax.Array], sources: list[jax.Array]
) -> jax.Array:
    """Z."""
    known = constants | dict(zip(derived.sources, sources, strict=True)) | dict(zip(derived.fixed, fixed, strict=True))
    return evaluate(derived.equations, known, [derived.value])[0]


def _is_local(vjp: Program, shape: tuple[int, ...]) -> bool:
    """Whether an entry of Z depends on the same entry of its sources alone: the labels of its VJP say so."""
    units = np.arange(int(np.prod(shape))).reshape(shape)
    flow = labels.depends_on(vjp.equations, {vjp.inputs[-1]: labels.Labels.of(units)})
    found = [flow.of(atom) for atom in vjp.outputs]
    return all(label is None or label.within(units) for label in found)


def through_sources(
    derived: Sequence[Derived], constants: dict[Variable, Any], leaves: Sequence[Any], point: Sequence[Any]
) -> list[Any]:
    """The leaves of a carry as they are, where those that are derived move as Z does when the others leave ``point``.

    Where a slope of Z is not finite it counts as 0.

    Args:
      leaves: of the carry.
      point: the same values, but not what F or g is differentiated by. Whoever differentiates once more, by what the
        whole carry depends on, moves both: then a derived leaf moves with its own value, and the slopes with ``point``.
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
