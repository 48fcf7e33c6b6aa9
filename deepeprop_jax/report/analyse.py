"""``analyse``: what the library recognised in a network, and what each mode costs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Reach, Recurrence
from deepeprop_jax.jaxpr.program import Program
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.learner.by_segments import Length, by_segments, choose_length
from deepeprop_jax.learner.checks import check_options
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, Pending
from deepeprop_jax.learner.planner import analysed
from deepeprop_jax.learner.sequence import Stream, make_sequence
from deepeprop_jax.learner.signals import indices_of
from deepeprop_jax.learner.stepper import Stepper, before_sequence, stepper_of
from deepeprop_jax.network.arguments import as_avals, batch_size
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import PyTree, graph_of, with_constants
from deepeprop_jax.report.cost import Cost, multiply_adds, tree_bytes
from deepeprop_jax.report.memory import peak_bytes
from deepeprop_jax.report.table import table
from deepeprop_jax.traces.make_plan import make_plan
from deepeprop_jax.traces.plan import Mode, Plan
from deepeprop_jax.traces.state import trace_shapes


class LeafReport(NamedTuple):
    """How one real parameter leaf's own trace is held.

    Attributes:
      name: pytree path; a complex leaf stands as ``.real`` and ``.imag``.
      size: number of entries (of one layer, where the node has depth).
      kind: "local", "dense", "none", or "masked" (by ``trainable``).
      rows: rows of the trace in deep e-prop.
      exact_rows: rows of the trace with ``exact=True``.
      reason: why.
    """

    name: str
    size: int
    kind: str
    rows: int
    exact_rows: int
    reason: str


class NodeReport(NamedTuple):
    """What was recognised in one node.

    Attributes:
      name: as in the graph.
      carry_size: n, real numbers in the carry of one layer, without those of ``derived``.
      carry_leaves: (name, shape) per real carry leaf, likewise.
      derived: names of carry leaves that are functions of the others, as a spike is of its potential: without a trace.
      units, slots: units of the carry, and carry slots K of a unit.
      depth: number of identical layers.
      recurrence: "element-wise" (deep e-prop is exact here), "localised", "dense" or "feed-forward".
      reason: the recurrence in words.
      leaves: one report per real parameter leaf.
      remedy: what would make the node cheaper, or "".
      filters: (name, G) per node below whose output this one only filters, by G constants: what it owes to that node's
        parameters has G numbers for each, in place of ``carry_size``.
    """

    name: str
    carry_size: int
    carry_leaves: tuple[tuple[str, tuple[int, ...]], ...]
    derived: tuple[str, ...]
    units: int
    slots: int
    depth: int
    recurrence: str
    reason: str
    leaves: tuple[LeafReport, ...]
    remedy: str
    filters: tuple[tuple[str, int], ...] = ()


class ModeReport(NamedTuple):
    """One mode of ``deep_eprop``, its cost per step, and the segments that ``value_and_grad`` chooses for it."""

    exact: bool
    hops: int | None
    rank: int | None
    cost: Cost
    segment: Length
    carry_rank: int | None = None
    carry_factor: int | None = None

    @property
    def name(self) -> str:
        """As one would say it."""
        kind = "exact RTRL" if self.exact else "deep e-prop" if self.carry_rank is None else "projected carry"
        options = ("hops", "rank", "carry_rank", "carry_factor")
        given = [(name, getattr(self, name)) for name in options if name != "hops" or self.carry_rank is None]
        return "".join([kind, *(f", {name}={value}" for name, value in given if value is not None)])


class Analysis(NamedTuple):
    """The result of ``analyse``; prints as a table."""

    nodes: tuple[NodeReport, ...]
    modes: tuple[ModeReport, ...]
    batch: int

    def __str__(self) -> str:
        lines = []
        for node in self.nodes:
            depth = f" x {node.depth} layers" if node.depth > 1 else ""
            carry = ", ".join(f"{name or 'h'} {list(shape)}" for name, shape in node.carry_leaves) or "none"
            verb = "follows" if len(node.derived) == 1 else "follow"
            carry += f" ({', '.join(node.derived)} {verb} from these, without a trace)" if node.derived else ""
            lines.append(f"node {node.name}{depth}: carry {carry}; recurrence {node.recurrence}: {node.reason}")
            for name, rows in node.filters:
                lines.append(f"  filters node {name}: {rows} in place of {node.carry_size} numbers per parameter entry")
            if node.remedy:
                lines.append(f"  remedy: {node.remedy}")
            heads = ("parameter", "entries", "trace", "rows", "rows, exact", "why")
            lines += [*table([heads, *node.leaves], left=(0, 2, 5), indent="  "), ""]
        costs = [
            (
                mode.name,
                *(_short(count, 1024, ("B", "KiB", "MiB", "GiB")) for count in mode.cost[:3]),
                _short(mode.cost.multiply_adds, 1000, ("", "k", "M", "G")),
                mode.segment.steps,
            )
            for mode in self.modes
        ]
        heads = ("mode", "traces", "pending step", "gradient's peak", "multiply-adds a step", "steps a segment")
        lines.append(
            f"batch {self.batch}: what the state holds, estimates of the most that a gradient takes at once and of a "
            f"step's multiply-adds, and the longest segments:"
        )
        lines += table([heads, *costs])
        lines += dict.fromkeys(f"segments of {m.segment.steps}: {m.segment.reason}" for m in self.modes)
        return "\n".join(lines)


def analyse(
    network: object,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    rank: int | None = None,
    carry_rank: int | None = None,
    carry_factor: int | None = None,
    signals: tuple[str, ...] = (),
    trainable: PyTree = None,
) -> Analysis:
    """What the library recognised in a network, leaf by leaf, and what each mode costs.

    Args:
      network: what ``deep_eprop`` takes, or a learner (whose network is then analysed in all modes).
      params: the network's parameters; shapes are enough (``jax.eval_shape``).
      carry: with a leading batch axis.
      x: one step's input, (batch, ...).
      rank, carry_rank, carry_factor, signals, trainable: as in ``deep_eprop``; deep e-prop is then listed with and
        without rank, and a carry projected along ``carry_rank`` directions too, whole and as factors.

    Returns:
      An ``Analysis``: per node the recurrence and the rows of each parameter's trace with the reason, and per mode the
      bytes of traces and pending step (exact figures), the peak bytes of a gradient and the multiply-adds of a step
      (estimates, see ``Cost``: the peak was within a quarter of the compiled program's for all networks that it was
      compared for).

    Cost: traces the gradient in every mode, about as long as a compilation of it lowers; computes no values.

    Raises:
      ValueError: as ``deep_eprop`` and ``learner.init`` do.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> from deepeprop_jax import deep_eprop
    >>> cell = nn.SimpleCell(features=4)
    >>> x = jnp.ones((2, 3), jnp.float32)
    >>> params, carry = deep_eprop(cell).network.init(jax.random.key(0), x)
    >>> analysis = analyse(cell, params, carry, x)
    >>> analysis.nodes[0].recurrence, [leaf.rows for leaf in analysis.nodes[0].leaves]
    ('localised', [1, 1, 1])
    """
    check_options(Mode(rank=rank))
    check_options(Mode(carry_rank=carry_rank, carry_factor=carry_factor))
    graph = graph_of(as_cell(network.network if isinstance(network, OnlineLearner) else network))
    graph = with_constants(graph, indices_of(graph, signals))
    params, carry, x = as_avals(params, "params"), as_avals(carry, "carry"), as_avals(x, "x")
    network, trained = analysed(graph, trainable, params, carry, x, {})
    local, exact = (make_plan(network, trained, Mode(is_exact)) for is_exact in (False, True))
    has_depth = any(vertex.depth is not None for vertex in graph.nodes)
    hops = _useful_hops(local)
    modes = [Mode(True, m) for m in hops] + [Mode(False, m) for m in hops]
    if rank is not None:
        modes += [Mode(False, m, rank) for m in hops if not (m and has_depth)]  # others are refused by deep_eprop
    if carry_rank is not None:
        modes += [Mode(carry_rank=carry_rank, carry_factor=q) for q in dict.fromkeys((None, carry_factor))]
    nodes = tuple(_node_report(local, exact, v) for v in range(len(local.nodes)))
    plans = [make_plan(network, trained, mode._replace(signals=tuple(signals))) for mode in modes]
    reports = tuple(_mode_report(plan, params, carry, x) for plan in plans)
    return Analysis(nodes, reports, batch_size(carry, x))


def _mode_report(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> ModeReport:
    batch = batch_size(carry, x)
    stepper, length = stepper_of(plan, params, carry, x), choose_length(plan, batch)
    pending = Pending(carry, x, stepper.update, jax.ShapeDtypeStruct((batch,), bool))
    state = LearnerState(carry, trace_shapes(plan, batch), pending, carry)
    peak = tree_bytes((params, state)) + peak_bytes(_gradient_program(stepper, params, state, length.steps))
    sizes = tree_bytes(state.traces), tree_bytes(pending)
    cost = Cost(*sizes, peak, batch * multiply_adds(plan, length.steps))
    projection = plan.projection
    of_carry = (None, None) if projection is None else (projection.rank, projection.factor)
    return ModeReport(plan.exact, plan.hops, plan.rank, cost, length, *of_carry)


def _gradient_program(stepper: Stepper, params: PyTree, state: LearnerState, length: int) -> Program:
    """What ``value_and_grad`` runs, in a sequence of several segments."""

    def loss_fn(y: PyTree, target: PyTree) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return sum((jnp.sum(jnp.square(jnp.abs(leaf))).astype(float) for leaf in leaves), start=jnp.zeros(()))

    def run(params: PyTree, state: LearnerState, xs: PyTree, targets: PyTree) -> PyTree:
        given = {v: partial(_no_signal, stepper.plan, v) for v in stepper.plan.given.values()}
        sequence = make_sequence(stepper.plan, loss_fn, False, state.initial_carry, xs, targets, None, None, given)
        start = Stream(state.carry, before_sequence(stepper, state))
        ended = by_segments(params, start, sequence, length, exact=False)
        return ended, jnp.zeros_like(state.pending.active)

    steps = 3 * length
    xs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((steps, *leaf.shape), leaf.dtype), state.pending.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it says stands in the table
        return trace(run, params, state, xs, jax.ShapeDtypeStruct((steps,), bool), differentiated=True)


def _no_signal(plan: Plan, v: int, dy: PyTree, target: PyTree) -> PyTree:
    view, batch = plan.nodes[v].output, jax.tree.leaves(dy)[0].shape[0]
    zeros = jax.tree.unflatten(view.treedef, [jnp.zeros((batch, *aval.shape), aval.dtype) for aval in view.avals])
    return zeros["output"] if plan.graph.nodes[v].shows else zeros


def _useful_hops(plan: Plan) -> list[int | None]:
    """All hops, and where they differ from it, one hop and none."""
    layers = sum(plan.depth(v) for v, node in enumerate(plan.nodes) if node.recurrent)
    crossing = bool(plan.pairs) or any(plan.bands)
    return [None] + ([1] if crossing and layers > 2 else []) + ([0] if crossing else [])


def _node_report(local: Plan, exact: Plan, v: int) -> NodeReport:
    node = local.nodes[v]
    rows, exact_rows = ({i: b.rows for b in plan.own[v] for i in b.leaves} for plan in (local, exact))
    leaves = []
    for i, leaf in enumerate(node.leaves):
        kind, reason = leaf.reach.value, leaf.reason
        if i not in local.trained[v]:
            kind, reason = "masked", "masked by trainable: no trace, zero gradient"
        held = rows.get(i, 0), exact_rows.get(i, 0)
        leaves.append(LeafReport(leaf.name, node.params.sizes[i], kind, *held, reason))
    carry, units = node.carry, node.units
    names = ["" if name == "value" else name for name in carry.names]
    filters = tuple((local.nodes[k].name, len(kind.decays)) for (w, k), kind in local.filtered.items() if w == v)
    return NodeReport(
        node.name, carry.size, tuple(zip(names, carry.shapes, strict=True)), tuple(carry.set_aside),
        units.grid.shape[1], units.slots, local.depth(v), node.recurrence.value, node.why, tuple(leaves),
        _remedy(local, v), filters,
    )  # fmt: skip


def _remedy(plan: Plan, v: int) -> str:
    node = plan.nodes[v]
    dense = [leaf.name for i, leaf in enumerate(node.leaves) if leaf.reach is Reach.DENSE and i in plan.trained[v]]
    hints = []
    if plan.graph.nodes[v].path == () and plan.graph.nodes[v].depth is None and node.units.slots > 1:
        hints.append(
            "carry leaves of equal shape share their units, as the states of one layer do; several layers written as "
            "one function are one node, and differ from stack() of them in deep e-prop"
        )
    if dense:
        hints.append(
            f"{', '.join(dense)} take dense rows (n = {node.carry.size} per entry): use the parameter only where its "
            f"entry meets one unit of the new carry, or freeze it with trainable"
        )
    if node.recurrence is Recurrence.DENSE:
        hints.append("the blocks D cost n VJPs a step: let units meet only in matrix products that reach the carry")
        if len(node.carry.shapes) == 1 and len(node.units.slot) > 1:
            hints.append("if the carry packs several states into one array, return them as leaves of equal shape")
    return "; ".join(hints)


def _short(number: int, base: int, units: Sequence[str]) -> str:
    size, power = float(number), 0
    while size >= base and power < len(units) - 1:
        size, power = size / base, power + 1
    return f"{size:.{min(power, 1)}f} {units[power]}".rstrip()
