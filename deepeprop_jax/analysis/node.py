"""What is known of a cell, and of a network of cells, after analysis; ``network.py`` finds it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepeprop_jax.analysis.units import Units
from deepeprop_jax.jaxpr.program import Atom, Equation, Program, Rule, Variable, dot_axes
from deepeprop_jax.jaxpr.real_leaves import Parts, PyTree, RealView
from deepeprop_jax.network.cell import Graph

Reals = list[jax.Array]

Others = tuple[Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]]
"""The leaves that are no variables of differentiation, of (params, carry_tm1, input): see ``real_leaves.Parts``."""

Points = tuple[Reals, Reals]
"""Real leaves of (carry_t, carry_tm1)."""


class Cut(NamedTuple):
    """A cell in two parts, F and g, for one example and real leaves.

    Both take ``point``: the carries once more, not differentiated by (see ``derived_carry.through_sources``).

    Attributes:
      next_carry: F, ``(params, carry_tm1, input, others, point) -> carry_t``, with the other leaves.
      output: g, ``(params, carry_t, carry_tm1, input, others, carry_t_other, point) -> y_t``, likewise; here
        ``point`` is the pair (carry_t, carry_tm1).
      output_uses: which of "params", "carry_tm1" and "input" g depends on beside h_t.
      output_rows: where y_t is made of carry components alone, their indices; None where g computes something.
    """

    next_carry: Callable[..., Parts]
    output: Callable[..., Parts]
    output_uses: frozenset[str]
    output_rows: np.ndarray | None


class Pull(NamedTuple):
    """How some linear values follow from the cotangent of the carry.

    Attributes:
      outputs: what is wanted.
      frontier: variables that depend on one unit each, from which the rest follows.
      equations: the rest.
    """

    outputs: list[Atom]
    frontier: list[Variable]
    equations: list[Equation]


class Product(NamedTuple):
    """A ``dot_general`` of something from the forward pass with something linear in the cotangent.

    Attributes:
      equation: the dot.
      side: which of its operands is linear.
      swapped: whether the transpose of the (two-dimensional) product is wanted instead.
    """

    equation: Equation
    side: int
    swapped: bool = False

    @property
    def is_outer(self) -> bool:
        """Whether it is one of two vectors, with an entry for every pair of theirs."""
        return all(axes == ([], [0], []) for axes in dot_axes(self.equation))


class Cuts(NamedTuple):
    """A node's parameter gradient, cut so that sums over time are matrix products.

        theta_bar = after(products z * delta, sums delta)

    z comes from the forward pass, delta is linear in the cotangent, and ``after`` is linear and the same at every step,
    so sums over steps and examples commute with it: one matrix product per weight and segment, whatever rearranges the
    weights afterwards (transposes, concatenated kernels, weight norm, a weight used twice).

    Attributes:
      variables: what is summed over time.
      products: per variable its product; None where the variable itself is summed.
      after: equations from the sums to the parameters.
      outputs: the parameters' cotangents.
    """

    variables: list[Variable]
    products: list[Product | None]
    after: list[Equation]
    outputs: list[Atom]


class VjpProgram(NamedTuple):
    """A node's step and its VJP as one flat program, split by what each value depends on.

    Attributes:
      program: all of it.
      params, carry_tm1, input: input variables of the real leaves; ``*_other`` those of the other leaves.
      cotangents: input variables, the cotangent of each real leaf of the new carry.
      carry_t, carry_t_other: outputs.
      step: variables that depend on the step, not on the cotangent.
      linear: variables that depend on the cotangent.
      before_loop: variables of the step that the loop reads and that do not depend on the carry.
      loop: equations of the new carry that depend on the old one.
      stored: variables that the loop hands out for the backward pass.
      unit: per linear variable whose elements depend on one unit each, that unit (0 where on none).
      first_unit: per carry leaf, the number of its first unit.
      cuts: the parameters' cotangents.
      to_params, to_carry, to_input: pulls of the deltas of ``cuts``, of carry_bar_tm1 and of input_bar.
      local_rule: how to evaluate carry_bar_tm1 cut to unit-local blocks; None where labels cannot cut it.
      transposed: weights that ``to_carry`` reads transposed: the new variable, and what it is the transpose of.
    """

    program: Program
    params: list[Variable]
    carry_tm1: list[Variable]
    input: list[Variable]
    params_other: list[Variable]
    carry_other: list[Variable]
    input_other: list[Variable]
    cotangents: list[Variable]
    carry_t: list[Atom]
    carry_t_other: list[Atom]
    step: set[Variable]
    linear: set[Variable]
    before_loop: list[Variable]
    loop: list[Equation]
    stored: list[Variable]
    unit: dict[Variable, np.ndarray]
    first_unit: list[int]
    cuts: Cuts
    to_params: Pull
    to_carry: Pull
    to_input: Pull
    local_rule: Rule | None
    transposed: dict[Variable, Variable]


class Reach(enum.Enum):
    """How many units an entry of a parameter reaches within a step: none, one, or several."""

    NONE = "none"
    LOCAL = "local"
    DENSE = "dense"


class Leaf(NamedTuple):
    """How the own-node influence of one real parameter leaf looks.

    Attributes:
      name: pytree path within the node's params.
      reach: of its entries.
      unit: in the leaf's shape, the unit that each entry reaches, where local; stride 0 where it does not change.
      reason: in words, for tables.
    """

    name: str
    reach: Reach
    unit: np.ndarray | None
    reason: str


class Recurrence(enum.Enum):
    """How the new carry depends on the old one: unit by unit, or so once its matrix products are cut, or not."""

    ELEMENTWISE = "element-wise"
    LOCALISED = "localised"
    DENSE = "dense"
    FEED_FORWARD = "feed-forward"


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
      recurrence: dF/dh; ``why`` in words, for tables.
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
    why: str

    @property
    def elementwise(self) -> bool:
        """Whether dF/dh is unit-local as it stands, so that deep e-prop is exact in this node."""
        return self.recurrence is Recurrence.ELEMENTWISE

    @property
    def recurrent(self) -> bool:
        """Whether the node has a carry with a derivative."""
        return self.carry.size > 0


class AnalysedNetwork(NamedTuple):
    """What is known of a network before it is decided what to keep.

    Attributes:
      graph: the network.
      nodes: per vertex, its cell after analysis (of one layer, where the vertex has depth).
      output: view of the network's output, of one example.
      output_avals: its shapes and dtypes.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    output: RealView
    output_avals: PyTree
