"""What in a cell is local to a unit: the rows of each parameter's own influence, and the blocks of its recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from deepeprop_jax.analysis import labels
from deepeprop_jax.analysis.cell_parts import Cut, Views
from deepeprop_jax.analysis.transition import cut_cell
from deepeprop_jax.analysis.units import Units, units_of
from deepeprop_jax.analysis.vjp import VjpProgram, vjp_program
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.program import Atom
from deepeprop_jax.jaxpr.real_leaves import PyTree, RealView


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
    """

    kind: str
    reason: str


class Node(NamedTuple):
    """A cell after analysis.

    Attributes:
      name: as in the graph.
      apply: the user's ``apply``.
      params, carry, input, output: its pytrees as real leaves, of one example; leaves of the carry that are
        functions of others are set aside (derived_carry.py).
      cut: F and g.
      units: the units of the carry.
      program: a step and its VJP.
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
    program: VjpProgram
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
    """Find F, g, the program of a step and its VJP, and in it which rows each parameter has and how units mix.

    Args:
      name: for tables and errors.
      apply: the cell's ``apply``.
      params, carry, x, y: shapes and dtypes for one example (``jax.ShapeDtypeStruct`` leaves).
      external: whether x is made of the network's input alone, and needs no derivative.

    Cost: one trace of the cell and one of its VJP, and labels of the size of the program's arrays, without the axes
    along which a label does not change: for most weights, one of two; no values are computed.
    """
    aside = range(len(jax.tree.leaves(x))) if external else ()
    views = Views(RealView(params), RealView(carry), RealView(x, aside), RealView(y))
    cut, views = cut_cell(apply, views)
    units = units_of(views.carry)
    program = vjp_program(cut, views, units)
    if views.carry.size == 0:
        leaves = tuple(Leaf(leaf, "none", None, "no carry") for leaf in views.params.names)
        return Node(name, apply, *views, cut, units, program, leaves, Recurrence("feed-forward", "no carry"))
    pairs = zip(views.params.names, program.cuts.outputs, strict=True)
    leaves = tuple(_leaf(leaf, atom, program.labels) for leaf, atom in pairs)
    return Node(name, apply, *views, cut, units, program, leaves, _recurrence(program))


def _leaf(name: str, atom: Atom, flow: labels.Labelling) -> Leaf:
    label = flow.of(atom)
    if label is None or thin.core(label.empty).all():
        return Leaf(name, "none", None, "never reaches the carry")
    if not label.pure:
        return Leaf(name, "dense", None, f"an entry reaches several units within a step ({flow.culprits[atom]})")
    return Leaf(name, "local", thin.compact(label.unit), "each entry reaches one unit")


def _recurrence(program: VjpProgram) -> Recurrence:
    flow = program.localised
    if flow is program.labels:
        return Recurrence("element-wise", "each unit depends on its own past alone")
    if flow is None:
        reason = f"units coupled in a way that labels cannot cut ({program.mixing}): blocks from the full Jacobian"
        return Recurrence("dense", reason)
    dots = len(flow.local_dots)
    reason = f"units coupled by {dots} matrix product{'s' * (dots != 1)}, cut to the unit-local entries"
    return Recurrence("localised", reason)
