"""The cost model: the multiply-adds of one step, from the plan alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.program import Equation, dot_axes, shape_of
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.network.cell import PyTree, parents
from deepeprop_jax.traces.block import Rows
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


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a pytree (or of their shapes)."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(leaf.shape, dtype=int)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def multiply_adds(plan: Plan, steps: int) -> int:
    """``Cost.multiply_adds``, for one example.

    Args:
      steps: C, those of a segment.
    """
    total = sum(plan.depth(v) * _of_a_layer(plan, v) for v in range(len(plan.nodes)))
    if plan.projection is not None:
        rank = plan.projection.rank
        entries = sum(plan.all_columns(k) for k in plan.projection.sources)
        layouts = [layout for layout in plan.projection.layouts if layout is not None]
        entries -= sum(block.columns for layout in layouts for block in layout.blocks)
        total += -(-rank * (rank + 1) * entries // steps)  # U M A V and (λ A) V, once a segment
        total += sum(_low_rank(layout, steps) for layout in layouts)
    return total


def _of_a_layer(plan: Plan, v: int) -> int:
    node, has_depth, sources = plan.nodes[v], plan.graph.nodes[v].depth is not None, _whole_sources(plan, v)
    forward = _program_multiply_adds(node)
    n, slots = node.carry.size, node.units.slots
    inputs, outputs = node.input.size, node.output.size
    full = plan.full_jacobian(v)
    recurrence = n if full else slots  # multiply-adds per trace number
    total = 3 * forward  # forward, and both products of the reverse pass
    for block in plan.own[v]:
        per_row = slots if block.kind is Rows.LOCAL else recurrence
        total += block.rows * block.columns * (per_row + 1)  # advance and contract
    layout = plan.low_rank[v]
    if layout is not None:
        total += _low_rank(layout, 1)
    passed_on = any(p == v for p, _ in plan.transmitted)
    reached = bool(sources) or (has_depth and (passed_on or plan.bands[v] > 0))  # its carry, by others' influences
    dense = any(block.kind is Rows.DENSE for block in plan.own[v])
    if plan.projection is not None:
        total += 2 * plan.projection.rank * forward  # one VJP per direction
        layout = plan.projection.layouts[v]
        if layout is not None:  # whose products of weights are not multiplied out
            total -= plan.projection.rank * sum(block.columns for block in layout.blocks)
    if n and (plan.projection is None or plan.own[v]):  # one VJP per carry component, or per slot of a unit
        total += 2 * (n if dense or full or reached else slots) * forward
    factors = _in_factors(plan, v)
    arriving = sum(plan.all_columns(k) for k in sources) - sum(factors.values())
    whole = {pair: kept for pair, kept in plan.pairs.items() if pair not in plan.filtered}
    kept = sum(pair.columns for (target, _), pair in whole.items() if target == v)
    for (target, k), kind in plan.filtered.items():  # gathered from the source's own trace, and contracted
        columns = sum(block.columns for block in kind.blocks)
        total += len(kind.decays) * columns * (plan.nodes[k].units.slots + 2) if target == v else 0
    total += n * inputs * arriving + n * (kept + plan.bands[v] * plan.columns[v]) * (recurrence + 1)
    for k, columns in factors.items():
        source = plan.nodes[k]
        total += n * inputs * source.carry.size + n * source.units.slots * columns
    upward = sum(plan.all_columns(k) for k in range(v + 1) if (v, k) in plan.transmitted)
    if upward and node.cut.output_rows is None:
        total += outputs * (n + inputs) * upward + 2 * outputs * forward
    return total


def _whole_sources(plan: Plan, v: int) -> list[int]:
    """Nodes below v whose influence arrives at v, but for those that it only filters."""
    return [k for k in plan.sources(v) if (v, k) not in plan.filtered]


def _low_rank(layout: Layout, steps: int) -> int:
    """Of one product of low rank, once a segment of so many steps."""
    slots, rank, rows, columns = layout.slots, layout.rank, layout.slots * layout.rows, layout.columns
    once = slots * (rank + PROBES) * rows  # through D
    once += 2 * rank**2 * (rows + columns) + 4 * rank**2 * rows  # with the kept factors; an orthonormal basis
    once += rank * sum(block.columns for block in layout.blocks)  # the gradient
    return (2 * rank + PROBES) * (rows + columns) - (-once // steps)  # with the factors of every step


def _in_factors(plan: Plan, v: int) -> dict[int, int]:
    """Per source, the columns that arrive at node v as two factors, see ``influence``."""
    vertices = plan.graph.nodes
    if vertices[v].depth is not None:
        return {}
    direct = [k for k in _whole_sources(plan, v) if k in parents(vertices[v].wire) and vertices[k].depth is None]
    return {k: sum(block.columns for block in plan.own[k] if block.kind is Rows.LOCAL) for k in direct}


def _program_multiply_adds(node: Node) -> int:
    """Of the cell itself: those of dots and convolutions, and one per element elsewhere."""

    def avals(view: RealView) -> PyTree:
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
