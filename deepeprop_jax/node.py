"""One cell seen as h_t = F(theta, h_tm1, u), y_t = g(theta, h_t, h_tm1, u), and what in it is local to a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax import labels as lb
from deepeprop_jax.jaxprs import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    dependents,
    evaluate,
    is_variable,
    shape_of,
    trace,
)
from deepeprop_jax.real import Parts, PyTree, RealView

Reals = list[jax.Array]


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


class Leaf(NamedTuple):
    """How the own-node influence of one real parameter leaf looks.

    Attributes:
      name: pytree path within the node's params.
      kind: "local" (each entry reaches one unit), "dense" (reaches several), "none" (never reaches the carry).
      unit: (size,) the unit that each entry reaches, where local.
      reason: in words, for tables.
    """

    name: str
    kind: str
    unit: np.ndarray | None
    reason: str


class Node(NamedTuple):
    """A cell after analysis. All functions are written for one example and for real leaves.

    ``others`` are the leaves that carry no derivative, of (params, carry_tm1, input).

    Attributes:
      name: as in the graph.
      apply: the user's ``apply``.
      params, carry, input, output: views of the four pytrees.
      units: the units of the carry.
      leaves: one entry per real parameter leaf.
      recurrence: "element-wise", "localised", "dense" or "feed-forward".
      reason: the recurrence in words.
      next_carry: F, ``(params, carry_tm1, input, others) -> carry_t``.
      output_map: g, ``(params, carry_t, carry_tm1, input, others, carry_t_other) -> y_t``.
      blocks: D, ``(params, carry_tm1, input, others) -> (K, K, units)``, entry [r, s, i] = dh_t[r, i] / dh_tm1[s, i].
      output_uses: which of "params", "carry_tm1" and "input" g depends on beside h_t.
      output_rows: where y_t is made of carry components alone, their indices; None where g computes something.
    """

    name: str
    apply: Callable
    params: RealView
    carry: RealView
    input: RealView
    output: RealView
    units: Units
    leaves: tuple[Leaf, ...]
    recurrence: str
    reason: str
    next_carry: Callable[..., Reals]
    output_map: Callable[..., Reals]
    blocks: Callable[..., jax.Array]
    output_uses: frozenset[str]
    output_rows: np.ndarray | None

    @property
    def elementwise(self) -> bool:
        """Whether dF/dh is unit-local as it stands, so that deep e-prop is exact in this node."""
        return self.recurrence == "element-wise"

    @property
    def recurrent(self) -> bool:
        """Whether the node has a carry with a derivative."""
        return self.carry.size > 0


Others = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]


def analyse_node(name: str, apply: Callable, params: PyTree, carry: PyTree, x: PyTree, y: PyTree) -> Node:
    """Find F, g, the unit-local rows of each parameter and the unit-local blocks of the recurrence.

    Args:
      name: for tables and errors.
      apply: the cell's ``apply``.
      params, carry, x, y: shapes and dtypes for one example (``jax.ShapeDtypeStruct`` leaves).

    Cost: one trace of the cell and of its VJP, and labels of the size of the program's arrays; no values are computed.
    """
    views = RealView(params), RealView(carry), RealView(x), RealView(y)
    next_carry, output_map, output_uses, output_rows = _cut(apply, (params, carry, x), views)
    view_p, view_h, view_u, _ = views
    units = units_of(view_h)
    if view_h.size == 0:
        leaves = tuple(Leaf(leaf, "none", None, "no carry") for leaf in view_p.names)
        functions = (next_carry, output_map, _no_blocks, output_uses, None)
        return Node(name, apply, *views, units, leaves, "feed-forward", "no carry", *functions)

    # The VJP of F is linear in the cotangent of h_t, and JAX has resolved custom rules, jit and remat in it.
    def vjp(p: Reals, h: Reals, u: Reals, others: Others, ct: Reals) -> tuple[Reals, Reals]:
        return jax.vjp(lambda p, h: next_carry(p, h, u, others), p, h)[1](ct)

    reals = [_real_avals(view) for view in (view_p, view_h, view_u)]
    others = (view_p.other_avals, view_h.other_avals, view_u.other_avals)
    program = trace(vjp, *reals, others, reals[1])
    count_p, count_h = len(view_p.shapes), len(view_h.shapes)
    cotangents = program.inputs[-count_h:]
    params_bar, carry_bar = program.outputs[:count_p], program.outputs[count_p:]
    ids = [
        units.unit[start : start + size].reshape(shape)
        for start, size, shape in zip(np.cumsum([0, *view_h.sizes]), view_h.sizes, view_h.shapes, strict=False)
    ]
    seeds = {variable: lb.Labels.of(unit) for variable, unit in zip(cotangents, ids, strict=True)}
    exact = lb.depends_on(program.equations, seeds)
    leaves = tuple(_leaf(leaf, atom, exact) for leaf, atom in zip(view_p.names, params_bar, strict=True))
    recurrence, reason, blocks = _localise(program, carry_bar, ids, seeds, exact, view_h, units, next_carry)
    functions = (next_carry, output_map, blocks, output_uses, output_rows)
    return Node(name, apply, *views, units, leaves, recurrence, reason, *functions)


def _real_avals(view: RealView) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(view.shapes, view.dtypes, strict=True)]


# --- the cut at the new carry ----------------------------------------------------------------------------------------


def _cut(
    apply: Callable, args: tuple[PyTree, PyTree, PyTree], views: tuple[RealView, ...]
) -> tuple[Callable, Callable, frozenset[str], np.ndarray | None]:
    """F and g of a cell: two backward slices of its program, which meet at the new carry."""
    view_p, view_h, view_u, view_y = views
    flat_args = [jax.tree.leaves(arg) for arg in args]

    def flat(*leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        trees = [jax.tree.unflatten(view.treedef, part) for view, part in zip(views, leaves, strict=False)]
        carry_t, y = apply(*trees)
        return jax.tree.leaves(carry_t), jax.tree.leaves(y)

    program = trace(flat, *flat_args)
    count = len(view_h.avals)
    carry_atoms, output_atoms = program.outputs[:count], program.outputs[count:]
    recover = _recoverable(program, carry_atoms)
    carry_equations = backward_slice(program.equations, carry_atoms)
    free_outputs = [atom for atom in output_atoms if not (is_variable(atom) and atom in recover)]
    output_equations = backward_slice(program.equations, free_outputs, recover)
    used = [atom for equation in output_equations for atom in equation.inputs] + output_atoms
    needed = [variable for variable in recover if variable in used]
    ends = np.cumsum([len(view_p.avals), len(view_h.avals), len(view_u.avals)])
    groups = zip(("params", "carry_tm1", "input"), np.split(np.arange(ends[-1]), ends[:-1]), strict=True)
    used_variables = {atom for atom in used if is_variable(atom)}
    uses = frozenset(name for name, group in groups if any(program.inputs[i] in used_variables for i in group))

    def environment(p: Reals, h: Reals, u: Reals, others: Others) -> dict[Variable, Any]:
        parts = zip(views, (p, h, u), others, strict=False)
        leaves = [leaf for view, real, other in parts for leaf in view.join_leaves(real, other)]
        return {**program.constants, **dict(zip(program.inputs, leaves, strict=True))}

    def next_carry(p: Reals, h: Reals, u: Reals, others: Others) -> Reals:
        return view_h.split_leaves(evaluate(carry_equations, environment(p, h, u, others), carry_atoms)).real

    def output_map(p: Reals, carry_t: Reals, h: Reals, u: Reals, others: Others, carry_t_other: Sequence[Any]) -> Reals:
        leaves = view_h.join_leaves(carry_t, carry_t_other)
        known = environment(p, h, u, others) | {variable: recover[variable](leaves) for variable in needed}
        return view_y.split_leaves(evaluate(output_equations, known, output_atoms)).real

    rows = None
    if not output_equations and not uses and all(is_variable(atom) and atom in recover for atom in output_atoms):
        rows = _selected_rows([recover[atom] for atom in output_atoms], view_h, view_y)
    return next_carry, output_map, uses, rows


def _selected_rows(outputs: list[Callable], view_h: RealView, view_y: RealView) -> np.ndarray | None:
    """Which carry components an output is made of, found by sending their numbers through in place of values."""
    dtypes = [*view_h.dtypes, *view_y.dtypes]
    if not view_h.size or view_h.other_avals or view_h.size >= 2**24 or any(d.itemsize < 4 for d in dtypes):
        return None  # numbers would not survive a narrow dtype
    with jax.ensure_compile_time_eval():
        numbers = [
            jnp.arange(start, start + size, dtype=dtype).reshape(shape)
            for start, size, shape, dtype in zip(
                np.cumsum([0, *view_h.sizes]), view_h.sizes, view_h.shapes, view_h.dtypes, strict=False
            )
        ]
        leaves = view_h.join_leaves(numbers, [])
        real = view_y.split_leaves([output(leaves) for output in outputs]).real
        return np.concatenate([np.asarray(leaf).ravel() for leaf in real]).astype(int) if real else None


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
    if equation.name in ("reshape", "squeeze", "broadcast_in_dim") and int(np.prod(shape_of(inputs[0]), dtype=int)) == size:
        return [(inputs[0], lambda x: jnp.reshape(x, source.shape))]
    if equation.name == "concatenate":
        axis = equation.params["dimension"]
        starts = np.cumsum([0] + [shape_of(atom)[axis] for atom in inputs])
        ends = zip(inputs, starts[:-1], starts[1:], strict=True)
        return [(atom, lambda x, a=int(a), b=int(b): jax.lax.slice_in_dim(x, a, b, axis=axis)) for atom, a, b in ends]
    if equation.name == "stack":
        axis = equation.params["axis"]
        return [
            (atom, lambda x, i=i: jax.lax.index_in_dim(x, i, axis, keepdims=False)) for i, atom in enumerate(inputs)
        ]
    if equation.name == "complex":
        return [(inputs[0], jnp.real), (inputs[1], jnp.imag)]
    kinds = [jnp.complexfloating, jnp.floating]
    if equation.name == "convert_element_type" and any(
        jnp.issubdtype(source.dtype, kind) and jnp.issubdtype(output.aval.dtype, kind) for kind in kinds
    ):
        return [(inputs[0], lambda x: x.astype(source.dtype))]
    return []


# --- rows of a parameter, blocks of the recurrence -------------------------------------------------------------------


def _leaf(name: str, atom: Atom, flow: lb.Flow) -> Leaf:
    label = flow.of(atom)
    if label is None or label.empty.all():
        return Leaf(name, "none", None, "never reaches the carry")
    if not label.pure:
        return Leaf(name, "dense", None, f"an entry reaches several units within a step ({flow.culprits[atom]})")
    return Leaf(name, "local", np.where(label.empty, 0, label.low).ravel(), "each entry reaches one unit")


def _localise(
    program: Program,
    carry_bar: list[Atom],
    ids: list[np.ndarray],
    seeds: dict[Variable, lb.Labels],
    exact: lb.Flow,
    view: RealView,
    units: Units,
    next_carry: Callable,
) -> tuple[str, str, Callable]:
    """The unit-local blocks D of dF/dh: one pass per slot where labels certify it, else from the full Jacobian."""
    equations = backward_slice(program.equations, carry_bar)

    def certified(flow: lb.Flow) -> bool:
        found = [flow.of(atom) for atom in carry_bar]
        return all(label is None or label.within(unit) for label, unit in zip(found, ids, strict=True))

    if certified(exact):
        flow, recurrence, reason = exact, "element-wise", "each unit depends on its own past alone"
    else:
        targets: dict[Variable, lb.Labels] = {}
        for atom, unit in zip(carry_bar, ids, strict=True):
            if is_variable(atom):
                label = lb.Labels.of(unit)
                targets[atom] = targets[atom].join(label) if atom in targets else label
        flow = lb.depends_on(equations, seeds, lb.feeds(equations, targets))
        recurrence, reason = "localised", f"units coupled by {len(flow.local_dots)} dots, cut to their unit-local entries"
        if not certified(flow):
            culprit = next(flow.culprits[atom] for atom in carry_bar if is_variable(atom) and atom in flow.culprits)
            reason = f"units coupled in a way that labels cannot cut ({culprit}): blocks from the full Jacobian"
            return "dense", reason, _blocks_from_jacobian(next_carry, units)

    rule = lb.localised(flow)
    basis = np.eye(units.slots)[units.slot].T  # (K, n): ones on slot r
    # Only variables that the cotangent reaches run under the slot axis; the others are shared by all slots.
    linear = dependents(equations, seeds)
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
            carry = evaluate(after, known | dict(zip(seeds, cts, strict=True)), carry_bar, rule)
            return to_grid(view.flatten([jnp.broadcast_to(c, x.shape) for c, x in zip(carry, h, strict=True)]), units)

        return jax.vmap(slot_row)(jnp.asarray(basis, jnp.result_type(*h)))

    return recurrence, reason, blocks


def _blocks_from_jacobian(next_carry: Callable, units: Units) -> Callable:
    def blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
        _, vjp = jax.vjp(lambda h: next_carry(p, h, u, others), h)
        view = RealView(h)
        rows = jax.vmap(lambda ct: view.flatten(vjp(cast_like(view.unflatten(ct), h))[0]))
        jacobian = rows(jnp.eye(view.size, dtype=jnp.result_type(*h)))
        padded = jnp.pad(jacobian, ((0, 1), (0, 1)))
        return padded[units.grid[:, None], units.grid[None]]

    return blocks


def _no_blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
    return jnp.zeros((0, 0, 0))


def cast_like(values: Reals, like: Reals) -> Reals:
    """Each value in the dtype of its counterpart: a cotangent's dtype must be that of the output."""
    return [value.astype(leaf.dtype) for value, leaf in zip(values, like, strict=True)]


def to_grid(vector: jax.Array, units: Units) -> jax.Array:
    """(..., n) carry components as (..., slots, units), zero where a unit has fewer slots."""
    n = len(units.slot)
    if np.array_equal(units.grid.ravel(), np.arange(n)):
        return vector.reshape(*vector.shape[:-1], *units.grid.shape)
    padded = jnp.concatenate([vector, jnp.zeros((*vector.shape[:-1], 1), vector.dtype)], axis=-1)
    return padded[..., units.grid]


def from_grid(grid: jax.Array, units: Units) -> jax.Array:
    """The inverse of ``to_grid``: (..., slots, units) as (..., n)."""
    if np.array_equal(units.grid.ravel(), np.arange(len(units.slot))):
        return grid.reshape(*grid.shape[:-2], -1)
    return grid[..., units.slot, units.unit]


__all__ = ["Leaf", "Node", "Parts", "Units", "analyse_node", "cast_like", "from_grid", "to_grid", "units_of"]
