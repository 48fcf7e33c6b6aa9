"""What in a cell is local to a unit: the rows of each parameter's own influence, and the blocks of its recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis import labels as lb
from deepeprop_jax.analysis.transition import Cut, Others, Reals, Views, cut_cell
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    dependents,
    evaluate,
    is_variable,
    trace,
)
from deepeprop_jax.jaxpr.real_leaves import PyTree, RealView, float32_or_wider


class Units(NamedTuple):
    """The units of a carry: leaves of one shape share their units, one slot each.

    Attributes:
      slot: (n,) for each carry component its slot.
      unit: (n,) for each carry component its unit.
      grid: (slots, units) the carry component at a slot of a unit; n where a unit has fewer slots.
    """

    slot: np.ndarray
    unit: np.ndarray
    grid: np.ndarray

    @property
    def slots(self) -> int:
        """K, the number of carry slots of a unit."""
        return self.grid.shape[0]


def units_of(carry: RealView) -> Units:
    """Group the carry's components into units."""
    first: dict[tuple[int, ...], int] = {}
    used: dict[tuple[int, ...], int] = {}
    slot: list[int] = []
    unit: list[int] = []
    for shape, size in zip(carry.shapes, carry.sizes, strict=True):
        start = first.setdefault(shape, sum(int(np.prod(known, dtype=int)) for known in first))
        slot += [used.get(shape, 0)] * size
        unit += range(start, start + size)
        used[shape] = used.get(shape, 0) + 1
    grid = np.full((max(slot, default=-1) + 1, max(unit, default=-1) + 1), carry.size)
    grid[slot, unit] = np.arange(carry.size)
    return Units(np.array(slot, int), np.array(unit, int), grid)


def unit_numbers(units: Units, carry: RealView) -> list[np.ndarray]:
    """For each real carry leaf, in its shape, the unit of each component."""
    ends = np.cumsum([0, *carry.sizes])
    return [units.unit[ends[i] : ends[i + 1]].reshape(shape) for i, shape in enumerate(carry.shapes)]


class Leaf(NamedTuple):
    """How the own-node influence of one real parameter leaf looks.

    Attributes:
      name: pytree path within the node's params.
      kind: "local" (each entry reaches one unit), "dense" (reaches several), "none" (never reaches the carry).
      unit: in the leaf's shape, the unit that each entry reaches, where local; stride 0 where it does not change.
      reason: in words, for tables.
    """

    name: str
    kind: str
    unit: np.ndarray | None
    reason: str


class Recurrence(NamedTuple):
    """How the new carry depends on the old one.

    Attributes:
      kind: "element-wise", "localised", "dense" or "feed-forward".
      reason: the same in words, for tables.
      blocks: D, ``(params, carry_tm1, input, others) -> (K, K, units)``, entry [r, s, i] = dh_t[r, i] / dh_tm1[s, i].
    """

    kind: str
    reason: str
    blocks: Callable[[Reals, Reals, Reals, Others], jax.Array]


class Node(NamedTuple):
    """A cell after analysis.

    Attributes:
      name: as in the graph.
      apply: the user's ``apply``.
      params, carry, input, output: its pytrees as real leaves, of one example; leaves of the carry that are
        functions of others are set aside (derived.py).
      cut: F and g.
      units: the units of the carry.
      leaves: one entry per real parameter leaf.
      recurrence: dF/dh.
    """

    name: str
    apply: Callable
    params: RealView
    carry: RealView
    input: RealView
    output: RealView
    cut: Cut
    units: Units
    leaves: tuple[Leaf, ...]
    recurrence: Recurrence

    @property
    def elementwise(self) -> bool:
        """Whether dF/dh is unit-local as it stands, so that deep e-prop is exact in this node."""
        return self.recurrence.kind == "element-wise"

    @property
    def recurrent(self) -> bool:
        """Whether the node has a carry with a derivative."""
        return self.carry.size > 0


def analyse_node(
    name: str, apply: Callable, params: PyTree, carry: PyTree, x: PyTree, y: PyTree, external: bool = False
) -> Node:
    """Find F, g, the unit-local rows of each parameter and the unit-local blocks of the recurrence.

    Args:
      name: for tables and errors.
      apply: the cell's ``apply``.
      params, carry, x, y: shapes and dtypes for one example (``jax.ShapeDtypeStruct`` leaves).
      external: whether x is made of the network's input alone, and needs no derivative.

    Cost: one trace of the cell and of its VJP, and labels of the size of the program's arrays, without the axes along
    which a label does not change: for most weights, one of two; no values are computed.
    """
    aside = range(len(jax.tree.leaves(x))) if external else ()
    views = Views(RealView(params), RealView(carry), RealView(x, aside), RealView(y))
    cut, views = cut_cell(apply, views)
    units = units_of(views.carry)
    if views.carry.size == 0:
        leaves = tuple(Leaf(leaf, "none", None, "no carry") for leaf in views.params.names)
        return Node(name, apply, *views, cut, units, leaves, Recurrence("feed-forward", "no carry", _no_blocks))

    # The VJP of F is linear in the cotangent of h_t, and JAX has resolved custom rules, jit and remat in it.
    def vjp(p: Reals, h: Reals, u: Reals, others: Others, ct: Reals) -> tuple[Reals, Reals]:
        return jax.vjp(lambda p, at: cut.next_carry(p, at, u, others, h), p, h)[1](ct)

    reals = [view.real_avals for view in views[:3]]
    others = tuple(view.other_avals for view in views[:3])
    program = trace(vjp, *reals, others, reals[1])
    count_p, count_h = len(views.params.shapes), len(views.carry.shapes)
    cotangents = program.inputs[-count_h:]
    params_bar, carry_bar = program.outputs[:count_p], program.outputs[count_p:]
    ids = unit_numbers(units, views.carry)
    seeds = {variable: lb.Labels.of(unit) for variable, unit in zip(cotangents, ids, strict=True)}
    exact = lb.depends_on(program.equations, seeds)
    leaves = tuple(_leaf(leaf, atom, exact) for leaf, atom in zip(views.params.names, params_bar, strict=True))
    recurrence = _recurrence(program, carry_bar, ids, seeds, exact, views.carry, units, cut)
    return Node(name, apply, *views, cut, units, leaves, recurrence)


# --- rows of a parameter, blocks of the recurrence -------------------------------------------------------------------


def _leaf(name: str, atom: Atom, flow: lb.Flow) -> Leaf:
    label = flow.of(atom)
    if label is None or thin.core(label.empty).all():
        return Leaf(name, "none", None, "never reaches the carry")
    if not label.pure:
        return Leaf(name, "dense", None, f"an entry reaches several units within a step ({flow.culprits[atom]})")
    return Leaf(name, "local", thin.compact(label.unit), "each entry reaches one unit")


def _recurrence(
    program: Program,
    carry_bar: list[Atom],
    ids: list[np.ndarray],
    seeds: dict[Variable, lb.Labels],
    exact: lb.Flow,
    view: RealView,
    units: Units,
    cut: Cut,
) -> Recurrence:
    """The unit-local blocks D of dF/dh: one pass per slot where labels certify it, else from the full Jacobian."""
    equations = backward_slice(program.equations, carry_bar)

    if lb.within_units(exact, carry_bar, ids):
        blocks = _blocks_by_slot(program, equations, carry_bar, list(seeds), exact, view, units)
        return Recurrence("element-wise", "each unit depends on its own past alone", blocks)
    flow = lb.cut_to_units(equations, carry_bar, ids, seeds)
    if lb.within_units(flow, carry_bar, ids):
        dots = len(flow.local_dots)
        reason = f"units coupled by {dots} matrix product{'s' * (dots != 1)}, cut to the unit-local entries"
        blocks = _blocks_by_slot(program, equations, carry_bar, list(seeds), flow, view, units)
        return Recurrence("localised", reason, blocks)
    # A label may also be pure and yet of another unit, as in a reversal: then nothing mixed it.
    blamed = [flow.culprits[atom] for atom in carry_bar if is_variable(atom) and atom in flow.culprits]
    culprit = blamed[0] if blamed else "units exchange places"
    reason = f"units coupled in a way that labels cannot cut ({culprit}): blocks from the full Jacobian"
    return Recurrence("dense", reason, _blocks_from_jacobian(cut, units))


def _blocks_by_slot(
    program: Program,
    equations: list[Equation],
    carry_bar: list[Atom],
    cotangents: list[Variable],
    flow: lb.Flow,
    view: RealView,
    units: Units,
) -> Callable[[Reals, Reals, Reals, Others], jax.Array]:
    """Where every unit's cotangent stays in the unit, ones on a whole slot give all its blocks in one pass."""
    rule = lb.localised(flow)
    basis = np.eye(units.slots)[units.slot].T  # (K, n): ones on slot r
    # Only variables that the cotangent reaches run under the slot axis; the others are shared by all slots.
    linear = dependents(equations, cotangents)
    before = [equation for equation in equations if equation.outputs[0] not in linear]
    after = [equation for equation in equations if equation.outputs[0] in linear]
    crossing = list(
        dict.fromkeys(
            atom
            for atom in [a for equation in after for a in equation.inputs] + list(carry_bar)
            if is_variable(atom) and atom not in linear
        )
    )

    def blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
        arguments = [*p, *h, *u, *others[0], *others[1], *others[2]]
        known = {**program.constants, **dict(zip(program.inputs, arguments, strict=False))}
        known |= dict(zip(crossing, evaluate(before, known, crossing), strict=True))

        def slot_row(ct: jax.Array) -> jax.Array:
            cts = [part.astype(leaf.dtype) for part, leaf in zip(view.unflatten(ct), h, strict=True)]
            carry = evaluate(after, known | dict(zip(cotangents, cts, strict=True)), carry_bar, rule)
            return to_grid(view.flatten([jnp.broadcast_to(c, x.shape) for c, x in zip(carry, h, strict=True)]), units)

        return jax.vmap(slot_row)(jnp.asarray(basis, float32_or_wider(*(leaf.dtype for leaf in h))))

    return blocks


def _blocks_from_jacobian(cut: Cut, units: Units) -> Callable[[Reals, Reals, Reals, Others], jax.Array]:
    def blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
        _, vjp = jax.vjp(lambda at: cut.next_carry(p, at, u, others, h), h)
        view = RealView(h)
        rows = jax.vmap(lambda ct: view.flatten(vjp(cast_like(view.unflatten(ct), h))[0]))
        jacobian = rows(jnp.eye(view.size, dtype=float32_or_wider(*view.dtypes)))
        padded = jnp.pad(jacobian, ((0, 1), (0, 1)))
        return padded[units.grid[:, None], units.grid[None]]

    return blocks


def _no_blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
    return jnp.zeros((0, 0, 0))


def cast_like(values: Reals, like: Reals) -> Reals:
    """Each value in the dtype of its counterpart: a cotangent's dtype must be that of the output."""
    return [value.astype(leaf.dtype) for value, leaf in zip(values, like, strict=True)]


def to_grid(values: jax.Array, units: Units, axis: int = -1) -> jax.Array:
    """Carry components along ``axis`` as two axes (slots, units), zero where a unit has fewer slots."""
    axis %= values.ndim
    shape = values.shape
    if np.array_equal(units.grid.ravel(), np.arange(len(units.slot))):
        return values.reshape(*shape[:axis], *units.grid.shape, *shape[axis + 1 :])
    zero = jnp.zeros((*shape[:axis], 1, *shape[axis + 1 :]), values.dtype)
    return jnp.take(jnp.concatenate([values, zero], axis=axis), units.grid, axis=axis)


def from_grid(grid: jax.Array, units: Units, axis: int = -1) -> jax.Array:
    """The inverse of ``to_grid``; ``axis`` is that of the carry components in what is returned."""
    axis %= grid.ndim - 1
    shape = grid.shape
    flat = grid.reshape(*shape[:axis], units.grid.size, *shape[axis + 2 :])
    if np.array_equal(units.grid.ravel(), np.arange(len(units.slot))):
        return flat
    return jnp.take(flat, units.slot * units.grid.shape[1] + units.unit, axis=axis)
