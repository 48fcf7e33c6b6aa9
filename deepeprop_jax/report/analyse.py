"""``analyse``: what the library recognised in a network, and what each mode costs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Reach, Recurrence
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.learner.deep_eprop import learner_with
from deepeprop_jax.learner.planner import Planner
from deepeprop_jax.learner.sequence import Length, choose_length
from deepeprop_jax.network.arguments import as_avals, batch_size
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import PyTree, graph_of
from deepeprop_jax.report.cost import Cost, cost_of, tree_bytes
from deepeprop_jax.report.memory import peak_bytes
from deepeprop_jax.traces.plan import Plan


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


class ModeReport(NamedTuple):
    """One mode of ``deep_eprop``, its cost per step, and the segments that ``value_and_grad`` chooses for it."""

    exact: bool
    hops: int | None
    rank: int | None
    cost: Cost
    segment: Length

    @property
    def name(self) -> str:
        """As one would say it."""
        options = {"hops": self.hops, "rank": self.rank}
        named = [f", {name}={value}" for name, value in options.items() if value is not None]
        return "".join(["exact RTRL" if self.exact else "deep e-prop", *named])


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
            if node.remedy:
                lines.append(f"  remedy: {node.remedy}")
            rows = [(leaf.name, leaf.size, leaf.kind, leaf.rows, leaf.exact_rows, leaf.reason) for leaf in node.leaves]
            lines += _table(("parameter", "entries", "trace", "rows", "rows, exact", "why"), rows, indent="  ")
            lines.append("")
        costs = [
            (
                m.name,
                _bytes(m.cost.trace_bytes),
                _bytes(m.cost.pending_bytes),
                _bytes(m.cost.peak_bytes),
                _count(m.cost.multiply_adds),
                str(m.segment.steps),
            )
            for m in self.modes
        ]
        heads = ("mode", "traces", "pending step", "gradient's peak", "multiply-adds a step", "steps a segment")
        lines.append(
            f"batch {self.batch}: what the state holds, estimates of the most that a gradient takes at once and of a "
            f"step's multiply-adds, and the longest segments:"
        )
        lines += _table(heads, costs)
        lines += dict.fromkeys(f"segments of {m.segment.steps}: {m.segment.reason}" for m in self.modes)
        return "\n".join(lines)


def analyse(
    network: Any, params: PyTree, carry: PyTree, x: PyTree, *, rank: int | None = None, trainable: Any = None
) -> Analysis:
    """What the library recognised in a network, leaf by leaf, and what each mode costs.

    Args:
      network: what ``deep_eprop`` takes, or a learner (whose network is then analysed in all modes).
      params: the network's parameters; shapes are enough (``jax.eval_shape``).
      carry: with a leading batch axis.
      x: one step's input, (batch, ...).
      rank, trainable: as in ``deep_eprop``; deep e-prop is then listed with and without rank.

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
    checks.check_options(False, None, rank)
    cell = as_cell(network.network if isinstance(network, OnlineLearner) else network)
    graph = graph_of(cell)
    exactly = Planner(graph, True, None, trainable)
    whole = {True: exactly, False: Planner(graph, False, None, trainable, like=exactly)}
    named = {"params": params, "carry": carry, "x": x}
    params, carry, x = (as_avals(tree, what) for what, tree in named.items())
    batch = batch_size(carry, x)
    has_depth = any(vertex.depth is not None for vertex in graph.nodes)
    local, exact = (whole[is_exact].plan(params, carry, x) for is_exact in (False, True))
    nodes = tuple(_node_report(local, exact, v) for v in range(len(local.nodes)))
    hops = _useful_hops(local)
    modes = []
    ranks = [None] if rank is None else [None, rank]
    for is_exact, r, m in [(True, None, m) for m in hops] + [(False, r, m) for r in ranks for m in hops]:
        if r is not None and m and has_depth:
            continue  # refused by deep_eprop
        mode = whole[is_exact]
        if m is not None or r is not None:
            mode = Planner(graph, is_exact, m, trainable, r, like=exactly)
        plan = mode.plan(params, carry, x)
        learner, length = learner_with(mode, cell), choose_length(plan, batch)
        state = jax.eval_shape(learner.init, params, carry, x)
        peak = _gradient_bytes(learner, params, state, x, length.steps)
        modes.append(ModeReport(is_exact, m, r, cost_of(plan, state.pending, batch, peak), length))
    return Analysis(nodes, tuple(modes), batch)


def _gradient_bytes(learner: OnlineLearner, params: PyTree, state: PyTree, x: PyTree, length: int) -> int:
    """``Cost.peak_bytes``, in a sequence of several segments."""
    steps = 3 * length
    xs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((steps, *leaf.shape), leaf.dtype), x)

    def loss_fn(y: PyTree, target: PyTree) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return sum((jnp.sum(jnp.square(jnp.abs(leaf))).astype(float) for leaf in leaves), start=jnp.zeros(()))

    targets = jax.ShapeDtypeStruct((steps,), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it says stands in the table
        program = trace(learner.value_and_grad(loss_fn), params, state, xs, targets, differentiated=True)
    return tree_bytes((params, state)) + peak_bytes(program)


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
        sizes = (leaf.name, node.params.sizes[i], kind, rows.get(i, 0), exact_rows.get(i, 0), reason)
        leaves.append(LeafReport(*sizes))
    carry = tuple(zip([n if n != "value" else "" for n in node.carry.names], node.carry.shapes, strict=True))
    units = node.units.grid.shape[1]
    return NodeReport(
        node.name,
        node.carry.size,
        carry,
        tuple(node.carry.set_aside),
        units,
        node.units.slots,
        local.depth(v),
        node.recurrence.value,
        node.why,
        tuple(leaves),
        _remedy(local, v),
    )


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
    shapes = set(node.carry.shapes)
    if node.recurrence is Recurrence.DENSE:
        hints.append("the blocks D cost n VJPs a step: let units meet only in matrix products that reach the carry")
        if len(shapes) == 1 and len(node.carry.shapes) == 1 and len(node.units.slot) > 1:
            hints.append(
                "if the carry packs several states into one array, return them as leaves of equal shape, (c, h)"
            )
    return "; ".join(hints)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "") -> list[str]:
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    numeric = [
        bool(rows) and all(not isinstance(row[i], str) or row[i][:1].isdigit() for row in rows)
        for i in range(len(heads))
    ]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append((indent + "  ".join(padded)).rstrip())
    return lines


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _count(number: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)
