"""Every unit vector on a carry's end, pulled back through a segment: rows that stay in one unit each.

What depends on one unit per element is, in the row of a unit, zero everywhere else. All rows together are what ones on
a slot give, (C, batch, ...), which is spread over rows only where it has to be. Mostly it meets a weight first: a row
of the product is then a row of the weight times a number, C b n m multiply-adds in place of C b n^2 m.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.units import Units, unit_numbers
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, add, broadcast, elementwise, pull
from deepeprop_jax.jaxpr.program import Equation, Variable, dot_axes, is_variable, shape_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.traces.block import spread


def back_units(part: NodeSegment, upto: str) -> Back:
    """``NodeSegment.back`` through D for every unit vector on the last carry, one per row."""
    node, found = part.node, part.slots()
    start, steps = (
        [
            _spread([slot[which][leaf] for slot in found], unit, node.units)
            for leaf, unit in enumerate(unit_numbers(node.units, node.carry))
        ]
        for which in (0, 1)
    )
    return Back(start, steps, [], _input(part, [steps for _, steps in found]) if upto == "input" else [])


def _input(part: NodeSegment, slots: Sequence[Leaves]) -> Leaves:
    """The input's cotangent, from those of every step's new carry for ones on each slot."""
    program, wanted = part.program, part.program.to_input
    by_slot = [part.frontier(wanted, steps) for steps in slots]
    values = {v: [frontier.get(v) for frontier in by_slot] for v in wanted.frontier}
    found: dict[Variable, Lifted] = {}
    rest: list[Equation] = []
    for equation in wanted.equations:
        rows = _rows_of_product(part, equation, values)
        if rows is None:
            rest.append(equation)
        else:
            found[equation.outputs[0]] = rows
    read = {atom for equation in rest for atom in equation.inputs if is_variable(atom)} | {*wanted.outputs}
    for variable in wanted.frontier:
        rows = _spread(values[variable], program.unit[variable], part.node.units) if variable in read else None
        if rows is not None:
            found[variable] = rows
    return pull(rest, found, program.linear, part.read, wanted.outputs)


def _spread(values: Sequence[Lifted | None], unit: np.ndarray, units: Units) -> Lifted | None:
    """Values for ones on each slot, each in the rows of its unit."""
    terms = []
    for slot, value in enumerate(values):
        own = (units.unit[:, None] == unit.ravel()) & (units.slot == slot)[:, None]
        if value is not None:
            mask = Lifted(own.reshape(-1, *unit.shape), "r")
            terms.append(elementwise(lambda m, x: jnp.where(m, x, 0), mask, value))
    return add(*terms)


def _rows_of_product(
    part: NodeSegment, equation: Equation, values: dict[Variable, list[Lifted | None]]
) -> Lifted | None:
    """The rows of a vector in the frontier times a weight; None for any other equation."""
    sides = [side for side, atom in enumerate(equation.inputs) if is_variable(atom) and atom in values]
    if equation.name != "dot_general" or len(sides) != 1:
        return None
    delta, other = equation.inputs[sides[0]], equation.inputs[1 - sides[0]]
    axes, unit = dot_axes(equation), part.program.unit[delta]
    weight = part.read(other)
    contracted = axes[1 - sides[0]].contract
    if weight.axes or len(shape_of(delta)) != 1 or len(contracted) != 1 or np.unique(unit).size < unit.size:
        return None
    by_unit = jnp.moveaxis(weight.value, contracted[0], 0)
    units, sizes, dtype = part.node.units, part.sizes, equation.outputs[0].aval.dtype
    place = np.full(units.grid.shape[1], unit.size)
    place[unit] = np.arange(unit.size)
    parts, order = [], []
    for slot, value in enumerate(values[delta]):
        rows = np.flatnonzero(units.slot == slot)
        places = place[units.unit[rows]]
        reached = places < unit.size
        order.append(np.concatenate([rows[reached], rows[~reached]]))
        numbers = Lifted(jnp.zeros(unit.size)) if value is None else value
        wide = broadcast(numbers, "cb", sizes)
        # A slot may have no unit that the vector depends on.
        wide = spread(wide, places[reached]) if reached.any() else wide[..., :0]
        wide = jnp.moveaxis(wide, -1, 1).astype(dtype)
        product = wide.reshape(*wide.shape, *(1,) * (by_unit.ndim - 1)) * by_unit[places[reached]][None, :, None]
        parts.append(jnp.pad(product, [(0, 0), (0, int((~reached).sum()))] + [(0, 0)] * (product.ndim - 2)))
    return Lifted(_in_order(jnp.concatenate(parts, axis=1), np.concatenate(order)), "crb")


def _in_order(rows: jax.Array, order: np.ndarray) -> jax.Array:
    """Rows along axis 1 that stand in another order, in that of the carry's components."""
    return rows if np.array_equal(order, np.arange(order.size)) else rows[:, np.argsort(order)]
