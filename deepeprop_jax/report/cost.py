"""The cost model: bytes of the state and multiply-adds of one step, from the plan alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.program import Equation, dot_axes, shape_of
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.network.cell import parents
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.depth import kept_pairs
from deepeprop_jax.traces.low_rank import PROBES, Layout
from deepeprop_jax.traces.plan import Plan


class Cost(NamedTuple):
    """What one mode costs.

    Attributes:
      trace_bytes: all traces in the learner's state.
      pending_bytes: the last step as the state keeps it (``learner.Pending``), listed apart.
      peak_bytes: estimate of the most that ``value_and_grad`` takes at once, compiled for a CPU, in segments of the
        length that it chooses: params and state as they go in, gradient and state as they come out, and all between;
        not xs and targets. A state that is donated takes its size less.
      multiply_adds: estimate for forward, gradient and trace update of one step together.
    """

    trace_bytes: int
    pending_bytes: int
    peak_bytes: int
    multiply_adds: int


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree (or of their shapes)."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(leaf.shape, dtype=int)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def trace_numbers(plan: Plan) -> int:
    """Numbers in all traces, for one example."""
    own = sum(plan.depth(v) * sum(block.rows * block.columns for block in plan.own[v]) for v in range(len(plan.nodes)))
    pairs = [kept_pairs(plan.depth(v), plan.bands[v]).target.size for v in range(len(plan.nodes))]
    bands = sum(pairs[v] * node.carry.size * plan.columns[v] for v, node in enumerate(plan.nodes))
    cross = sum(pair.layers * plan.nodes[v].carry.size * pair.columns for (v, _), pair in plan.pairs.items())
    low_rank = sum(plan.depth(v) * _low_rank_numbers(layout) for v, layout in enumerate(plan.low_rank))
    return own + low_rank + bands + cross


def _low_rank_numbers(layout: Layout | None) -> int:
    shapes = () if layout is None else layout.shapes(1, np.dtype(float))
    return sum(leaf.size for leaf in shapes)


def cost_of(plan: Plan, pending: Any, batch: int, peak: int) -> Cost:
    """The cost of a plan for a batch.

    Args:
      pending: shapes and dtypes.
      peak: ``Cost.peak_bytes``.
    """
    item = np.dtype(plan.dtype).itemsize
    traces = trace_numbers(plan) * batch * item
    held = tree_bytes(pending)
    adds = sum(_multiply_adds(plan, v) for v in range(len(plan.nodes)))
    return Cost(traces, held, peak, batch * adds)


def _widths(plan: Plan, v: int) -> tuple[int, int, int, int]:
    """Columns that arrive at node v, columns it passes on, kept ones of those, own ones (all layers of a source)."""
    arriving = sum(plan.all_columns(k) for k in plan.sources(v))
    upward = sum(plan.all_columns(k) for k in range(v + 1) if (v, k) in plan.transmitted)
    kept = sum(pair.columns for (target, _), pair in plan.pairs.items() if target == v)
    return arriving, upward, kept + plan.bands[v] * plan.columns[v], plan.columns[v]


def _local_columns(plan: Plan, k: int) -> int:
    """Columns whose influence on node k's own output stays two factors, see ``influence``."""
    has_depth = plan.graph.nodes[k].depth is not None
    return 0 if has_depth else sum(block.columns for block in plan.own[k] if block.kind is Rows.LOCAL)


def _in_factors(plan: Plan, v: int) -> dict[int, int]:
    """Per source, the columns that arrive at node v as two factors."""
    if plan.graph.nodes[v].depth is not None:
        return {}
    direct = parents(plan.graph.nodes[v].wire)
    return {k: _local_columns(plan, k) for k in plan.sources(v) if k in direct}


def _reached(plan: Plan, v: int) -> bool:
    """Whether influences of nodes below, or between its own layers, arrive at node v's carry."""
    passed_on = any(p == v for p, _ in plan.transmitted)
    return bool(plan.sources(v)) or (plan.graph.nodes[v].depth is not None and (passed_on or plan.bands[v] > 0))


def _multiply_adds(plan: Plan, v: int) -> int:
    node, depth = plan.nodes[v], plan.depth(v)
    forward = _program_multiply_adds(node)
    n, slots = node.carry.size, node.units.slots
    inputs, outputs = node.input.size, node.output.size
    arriving, upward, kept, _ = _widths(plan, v)
    recurrence = n if plan.full_jacobian(v) else slots  # multiply-adds per trace number
    total = 3 * forward  # forward, and both products of the reverse pass
    for block in plan.own[v]:
        per_row = slots if block.kind is Rows.LOCAL else recurrence
        total += block.rows * block.columns * (per_row + 1)  # advance and contract
    layout = plan.low_rank[v]
    if layout is not None:
        rank, rows, columns = layout.rank, slots * layout.rows, layout.columns
        total += slots * (rank + PROBES) * rows  # through D
        total += (2 * rank + PROBES + 2 * rank**2) * (rows + columns)  # with the step's factors and the kept ones
        total += 4 * rank**2 * rows  # an orthonormal basis
        total += rank * sum(block.columns for block in layout.blocks)  # the gradient
    dense = any(block.kind is Rows.DENSE for block in plan.own[v])
    if n and (dense or plan.full_jacobian(v) or _reached(plan, v)):
        total += 2 * n * forward  # one VJP per carry component
    elif n:
        total += 2 * slots * forward
    factors = _in_factors(plan, v)
    total += n * inputs * (arriving - sum(factors.values())) + n * kept * (recurrence + 1)
    for k, columns in factors.items():
        source = plan.nodes[k]
        total += n * inputs * source.carry.size + n * source.units.slots * columns
    if upward and node.cut.output_rows is None:
        total += outputs * (n + inputs) * upward + 2 * outputs * forward
    return depth * total


def _program_multiply_adds(node: Node) -> int:
    """Multiply-adds of the cell itself: of dots and convolutions, and one per element elsewhere."""

    def avals(view: RealView) -> Any:
        return jax.tree.unflatten(view.treedef, view.avals)

    program = trace(node.apply, avals(node.params), avals(node.carry), avals(node.input))
    return sum(_equation_multiply_adds(equation) for equation in program.equations)


def _equation_multiply_adds(equation: Equation) -> int:
    size = sum(int(np.prod(output.aval.shape, dtype=int)) for output in equation.outputs)
    if equation.name == "dot_general":
        lhs = shape_of(equation.inputs[0])
        return size * int(np.prod([lhs[axis] for axis in dot_axes(equation)[0].contract], dtype=int))
    if equation.name == "conv_general_dilated":
        kernel = shape_of(equation.inputs[1])
        features = equation.params["dimension_numbers"].rhs_spec[0]
        return size * int(np.prod(kernel, dtype=int)) // max(kernel[features], 1)
    return size
