"""The cut of a cell at its new carry: h_t = F(theta, h_tm1, u) and y_t = g(theta, h_t, h_tm1, u)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.derived_carry import derived_leaves, through_sources
from deepeprop_jax.analysis.node import Cut, Others, Points, Reals
from deepeprop_jax.jaxpr.complex_pairs import Complex, Value, both_parts, evaluate_in_pairs
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    is_in,
    read_by,
    shape_of,
    variables,
    weights_last,
)
from deepeprop_jax.jaxpr.real_leaves import Parts, RealView, real_dtype
from deepeprop_jax.jaxpr.trace import trace

Recovery = Callable[[Sequence[Value]], Value]
"""How a value follows from the leaves of the new carry."""


def cut_cell(apply: Callable, params: RealView, carry: RealView, x: RealView, y: RealView) -> tuple[Cut, RealView]:
    """F and g of a cell: two backward slices of its program, which meet at the new carry.

    g is cut at the new carry and at whatever is recovered from it by undoing a reshape, concatenate, stack, change of
    dtype or ``complex(re, im)``; anything else in y is an exact function of the old carry. Where the carry is kept in a
    narrower dtype than it is computed in, g and its derivative see the rounded carry: right to that dtype's rounding.

    Returns:
      F and g, and the view of the carry with leaves that are functions of others set aside.
    """
    views = (params, carry, x)

    def flat(*leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        trees = [jax.tree.unflatten(view.treedef, part) for view, part in zip(views, leaves, strict=True)]
        carry_t, y = apply(*trees)
        return jax.tree.leaves(carry_t), jax.tree.leaves(y)

    counts = [len(view.avals) for view in views]
    program = trace(flat, *(view.avals for view in views))
    program = weights_last(program, program.inputs[counts[0] :])
    carry_atoms, output_atoms = program.outputs[: counts[1]], program.outputs[counts[1] :]
    derived = derived_leaves(program, carry_atoms, carry)
    view_h = carry.without({d.leaf for d in derived})
    recover = _recoverable(program, carry_atoms)
    carry_equations = backward_slice(program.equations, carry_atoms)
    free_outputs = [atom for atom in output_atoms if not is_in(atom, recover)]
    output_equations = backward_slice(program.equations, free_outputs, recover)
    used = {*read_by(output_equations), *variables(output_atoms)}
    needed = [variable for variable in recover if variable in used]
    names = np.repeat(["params", "carry_tm1", "input"], counts)
    uses = frozenset(str(name) for name, variable in zip(names, program.inputs, strict=True) if variable in used)

    def whole_carry(h: Reals, other: Sequence[jax.Array], point: Reals) -> list[Value]:
        leaves, at = (view_h.join_leaves(real, other, Complex) for real in (h, point))
        return through_sources(derived, program.constants, leaves, at)

    def environment(p: Reals, h: Reals, u: Reals, others: Others, point: Reals) -> dict[Variable, Value]:
        before, behind = params.join_leaves(p, others[0], Complex), x.join_leaves(u, others[2], Complex)
        leaves = [*before, *whole_carry(h, others[1], point), *behind]
        return {**program.constants, **dict(zip(program.inputs, leaves, strict=True))}

    def next_carry(p: Reals, h: Reals, u: Reals, others: Others, point: Reals) -> Parts:
        found = evaluate_in_pairs(carry_equations, environment(p, h, u, others, point), carry_atoms)
        return view_h.split_leaves(found, both_parts)

    def output_map(
        p: Reals, carry_t: Reals, h: Reals, u: Reals, others: Others, carry_t_other: Sequence[jax.Array], point: Points
    ) -> Parts:
        leaves = whole_carry(carry_t, carry_t_other, point[0])
        known = environment(p, h, u, others, point[1]) | {variable: recover[variable](leaves) for variable in needed}
        return y.split_leaves(evaluate_in_pairs(output_equations, known, output_atoms), both_parts)

    rows = None
    if not output_equations and not uses and all(is_in(atom, recover) for atom in output_atoms):
        rows = _selected_rows([recover[atom] for atom in output_atoms], view_h, y)
    return Cut(next_carry, output_map, uses, rows), view_h


def _selected_rows(outputs: Sequence[Recovery], view_h: RealView, view_y: RealView) -> np.ndarray | None:
    """Which carry components an output is made of, found by sending their numbers through in place of values."""
    dtypes = [*view_h.dtypes, *view_y.dtypes]
    if not view_h.size or view_h.other_avals or view_h.size >= 2**24 or any(d.itemsize < 4 for d in dtypes):
        return None  # numbers would not survive a narrow dtype
    starts = np.cumsum([0, *view_h.sizes])
    parts = zip(starts, view_h.sizes, view_h.real_avals, strict=False)
    numbers = [np.arange(start, start + size, dtype=aval.dtype).reshape(aval.shape) for start, size, aval in parts]
    leaves = view_h.join_leaves(numbers, [], Complex)
    real = view_y.split_leaves([output(leaves) for output in outputs], both_parts).real
    return np.concatenate([leaf.ravel() for leaf in real]).astype(int) if real else None


def _recoverable(program: Program, carry_atoms: list[Atom]) -> dict[Variable, Recovery]:
    """Variables that the new carry determines, and how: the carry itself, and what it was packed from."""
    producer = {output: equation for equation in program.equations for output in equation.outputs}
    found: dict[Variable, Recovery] = {}

    def visit(atom: Atom, value: Recovery) -> None:
        if is_in(atom, producer) and atom not in found:
            found[atom] = value
            for source, undo in _undo(producer[atom]):
                visit(source, lambda leaves, undo=undo: undo(value(leaves)))

    for index, atom in enumerate(carry_atoms):
        visit(atom, lambda leaves, index=index: leaves[index])
    return found


def _undo(equation: Equation) -> list[tuple[Atom, Callable[[Value], Value]]]:
    """For an equation that only packs its inputs: each input, and how to get it from the output."""
    name, inputs, output = equation.name, equation.inputs, equation.outputs[0].aval
    if name in ("reshape", "squeeze", "broadcast_in_dim"):
        shape = shape_of(inputs[0])
        same = np.prod(shape, dtype=int) == np.prod(output.shape, dtype=int)
        return [(inputs[0], _of_parts(lambda x: x.reshape(shape)))] if same else []
    if name in ("concatenate", "stack"):
        sizes = [1 if name == "stack" else shape_of(atom)[equation.axis] for atom in inputs]
        starts = np.cumsum([0, *sizes]).tolist()
        parts = zip(inputs, starts[:-1], starts[1:], strict=True)
        return [(atom, _of_parts(functools.partial(_taken, equation, start, stop))) for atom, start, stop in parts]
    if name == "complex":
        return [(inputs[0], lambda x: x.re), (inputs[1], lambda x: x.im)]
    if name == "convert_element_type":
        old = inputs[0].aval.dtype
        kinds = (jnp.complexfloating, jnp.floating)
        if any(jnp.issubdtype(old, kind) and jnp.issubdtype(output.dtype, kind) for kind in kinds):
            return [(inputs[0], _of_parts(lambda x: x.astype(real_dtype(old))))]
    return []


def _taken(equation: Equation, start: int, stop: int, x: jax.Array) -> jax.Array:
    """One operand of a concatenate or stack, from its output; NumPy's arrays stay such."""
    axis = equation.axis
    taken = (
        x[(slice(None),) * axis + (slice(start, stop),)]
        if isinstance(x, np.ndarray)
        else (jax.lax.slice_in_dim(x, start, stop, axis=axis))
    )
    return taken.squeeze(axis) if equation.name == "stack" else taken


def _of_parts(function: Callable[[jax.Array], jax.Array]) -> Callable[[Value], Value]:
    """A function of both parts of a pair."""
    return lambda x: x.map(function) if isinstance(x, Complex) else function(x)
