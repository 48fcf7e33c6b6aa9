"""The cut of a cell at its new carry: h_t = F(theta, h_tm1, u) and y_t = g(theta, h_t, h_tm1, u)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.cell_parts import Cut, Others, Points, Reals, Views
from deepeprop_jax.analysis.derived_carry import derived_leaves, through_sources
from deepeprop_jax.jaxpr.complex_pairs import Pair, evaluate_in_pairs, join_pairs, split_pairs
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    is_variable,
    shape_of,
    trace,
    weights_last,
)
from deepeprop_jax.jaxpr.real_leaves import Parts, RealView


def cut_cell(apply: Callable, views: Views) -> tuple[Cut, Views]:
    """F and g of a cell: two backward slices of its program, which meet at the new carry.

    g is cut at the new carry and at whatever is recovered from it by undoing a reshape, concatenate, stack, change of
    dtype or ``complex(re, im)``; anything else in y is an exact function of the old carry. Where the carry is kept in a
    narrower dtype than it is computed in, g and its derivative see the rounded carry: right to that dtype's rounding.

    Returns:
      F and g, and the views with carry leaves that are functions of others set aside.
    """
    view_p, view_h, view_u, view_y = views

    def flat(*leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        trees = [jax.tree.unflatten(view.treedef, part) for view, part in zip(views[:3], leaves, strict=True)]
        carry_t, y = apply(*trees)
        return jax.tree.leaves(carry_t), jax.tree.leaves(y)

    program = trace(flat, *(view.avals for view in views[:3]))
    program = weights_last(program, program.inputs[len(view_p.avals) :])
    count = len(view_h.avals)
    carry_atoms, output_atoms = program.outputs[:count], program.outputs[count:]
    derived = derived_leaves(program, carry_atoms, view_h)
    view_h = view_h.without({d.leaf for d in derived})
    views = views._replace(carry=view_h)
    recover = _recoverable(program, carry_atoms)
    carry_equations = backward_slice(program.equations, carry_atoms)
    free_outputs = [atom for atom in output_atoms if not (is_variable(atom) and atom in recover)]
    output_equations = backward_slice(program.equations, free_outputs, recover)
    used = {a for equation in output_equations for a in equation.inputs if is_variable(a)}
    used |= {atom for atom in output_atoms if is_variable(atom)}
    needed = [variable for variable in recover if variable in used]
    ends = np.cumsum([len(view_p.avals), len(view_h.avals), len(view_u.avals)])
    groups = zip(("params", "carry_tm1", "input"), np.split(np.arange(ends[-1]), ends[:-1]), strict=True)
    uses = frozenset(name for name, group in groups if any(program.inputs[i] in used for i in group))

    def whole_carry(h: Reals, other: Sequence[Any], point: Reals) -> list[Any]:
        leaves, at = (join_pairs(view_h, real, other) for real in (h, point))
        return through_sources(derived, program.constants, leaves, at)

    def environment(p: Reals, h: Reals, u: Reals, others: Others, point: Reals) -> dict[Variable, Any]:
        params, x = join_pairs(view_p, p, others[0]), join_pairs(view_u, u, others[2])
        leaves = [*params, *whole_carry(h, others[1], point), *x]
        return {**program.constants, **dict(zip(program.inputs, leaves, strict=True))}

    def next_carry(p: Reals, h: Reals, u: Reals, others: Others, point: Reals) -> Parts:
        return split_pairs(view_h, evaluate_in_pairs(carry_equations, environment(p, h, u, others, point), carry_atoms))

    def output_map(
        p: Reals, carry_t: Reals, h: Reals, u: Reals, others: Others, carry_t_other: Sequence[Any], point: Points
    ) -> Parts:
        leaves = whole_carry(carry_t, carry_t_other, point[0])
        known = environment(p, h, u, others, point[1]) | {variable: recover[variable](leaves) for variable in needed}
        return split_pairs(view_y, evaluate_in_pairs(output_equations, known, output_atoms))

    rows = None
    if not output_equations and not uses and all(is_variable(atom) and atom in recover for atom in output_atoms):
        rows = _selected_rows([recover[atom] for atom in output_atoms], view_h, view_y)
    return Cut(next_carry, output_map, uses, rows), views


def _selected_rows(outputs: list[Callable], view_h: RealView, view_y: RealView) -> np.ndarray | None:
    """Which carry components an output is made of, found by sending their numbers through in place of values."""
    dtypes = [*view_h.dtypes, *view_y.dtypes]
    if not view_h.size or view_h.other_avals or view_h.size >= 2**24 or any(d.itemsize < 4 for d in dtypes):
        return None  # numbers would not survive a narrow dtype
    starts = np.cumsum([0, *view_h.sizes])
    parts = zip(starts, view_h.sizes, view_h.shapes, view_h.dtypes, strict=False)
    numbers = [np.arange(start, start + size, dtype=dtype).reshape(shape) for start, size, shape, dtype in parts]
    leaves = join_pairs(view_h, numbers, [])
    real = split_pairs(view_y, [output(leaves) for output in outputs]).real
    return np.concatenate([leaf.ravel() for leaf in real]).astype(int) if real else None


def _recoverable(program: Program, carry_atoms: list[Atom]) -> dict[Variable, Callable[[list[Any]], Any]]:
    """Variables that the new carry determines, and how: the carry itself, and what it was packed from.

    Undoes reshape, concatenate, stack, a change of dtype, and complex(re, im).
    """
    producer = {output: equation for equation in program.equations for output in equation.outputs}
    found: dict[Variable, Callable[[list[Any]], Any]] = {}

    def visit(atom: Atom, value: Callable[[list[Any]], Any]) -> None:
        if not is_variable(atom) or atom not in producer or atom in found:
            return
        found[atom] = value
        for source, undo in _undo(producer[atom]):
            visit(source, lambda leaves, undo=undo: undo(value(leaves)))

    for index, atom in enumerate(carry_atoms):
        visit(atom, lambda leaves, index=index: leaves[index])
    return found


def _undo(equation: Equation) -> list[tuple[Atom, Callable[[Any], Any]]]:
    """For an equation that only packs its inputs: each input, and how to get it from the output."""
    inputs, output = equation.inputs, equation.outputs[0]
    source = inputs[0].aval if inputs else None
    size = int(np.prod(output.aval.shape, dtype=int))
    if (
        equation.name in ("reshape", "squeeze", "broadcast_in_dim")
        and int(np.prod(shape_of(inputs[0]), dtype=int)) == size
    ):
        return [(inputs[0], _of_parts(lambda x: x.reshape(source.shape)))]
    if equation.name == "concatenate":
        axis = equation.params["dimension"]
        starts = np.cumsum([0] + [shape_of(atom)[axis] for atom in inputs])
        ends = zip(inputs, starts[:-1], starts[1:], strict=True)
        return [(atom, _of_parts(lambda x, a=int(a), b=int(b): _slice(x, a, b, axis))) for atom, a, b in ends]
    if equation.name == "stack":
        axis = equation.params["axis"]
        return [
            (atom, _of_parts(lambda x, i=i: _slice(x, i, i + 1, axis).squeeze(axis))) for i, atom in enumerate(inputs)
        ]
    if equation.name == "complex":
        return [(inputs[0], lambda x: x.re), (inputs[1], lambda x: x.im)]
    kinds = [jnp.complexfloating, jnp.floating]
    if equation.name == "convert_element_type" and any(
        jnp.issubdtype(source.dtype, kind) and jnp.issubdtype(output.aval.dtype, kind) for kind in kinds
    ):
        dtype = source.dtype if jnp.issubdtype(source.dtype, jnp.floating) else np.zeros(0, source.dtype).real.dtype
        return [(inputs[0], _of_parts(lambda x: x.astype(dtype)))]
    return []


def _slice(x: Any, start: int, stop: int, axis: int) -> Any:
    if isinstance(x, np.ndarray):
        return x[(slice(None),) * axis + (slice(start, stop),)]
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)


def _of_parts(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of both parts of a pair."""
    return lambda x: Pair(*map(function, x)) if isinstance(x, Pair) else function(x)
