"""Alike nodes, each fed by the one below alone: cotangents go down through them in one ``lax.scan``, compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.analysis.computed import parameter_values
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.network.cell import PyTree, parents
from deepeprop_jax.segments.cotangents import rows_of, vector
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.through_time import Past, with_inputs
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.products import own_columns

_FEWEST = 3
"""Nodes for which a loop is worth it."""


_MOST = 2**18
"""Numbers that the traces of a ladder may have for one example, with zeros for all that is not above a node."""


class Ladder(NamedTuple):
    """What a flow finds in the nodes of a ladder, with an axis of them in front, the lowest first.

    Attributes:
      start: (nodes, batch, rows, n) cotangents of their carries at the segment's start.
      columns: (nodes, batch, rows, columns) what their parameters have to do with the rows: in the segment, and by the
        own traces at its start.
      below: cotangent of the lowest one's input.
    """

    start: jax.Array
    columns: jax.Array
    below: Leaves


def ladders(plan: Plan) -> list[tuple[int, ...]]:
    """Longest stretches of alike nodes that are chained, lowest first; where influences are kept over all hops."""
    if plan.hops is not None or plan.rank is not None:
        return []
    readers: dict[int, int] = {}
    for vertex in plan.graph.nodes:
        for p in parents(vertex.wire):
            readers[p] = readers.get(p, 0) + 1
    output = set(parents(plan.graph.output))
    found: list[tuple[int, ...]] = []
    for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        chained = v > 0 and vertex.wire == v - 1 and readers[v - 1] == 1 and v - 1 not in output
        alike = chained and node.cut is plan.nodes[v - 1].cut and plan.trained[v] == plan.trained[v - 1]
        if alike:
            found[-1] += (v,)
        else:
            found.append((v,))
    rows = sum(plan.nodes[v].carry.size for v in {v for v, _ in plan.pairs})
    return [
        nodes
        for nodes in found
        if len(nodes) >= _FEWEST
        and plan.nodes[nodes[0]].recurrent
        and 0 < len(nodes) * rows * plan.columns[nodes[0]] <= _MOST
    ]


def climb_down(
    plan: Plan,
    parts: Sequence[NodeSegment],
    nodes: tuple[int, ...],
    dy: Leaves,
    end: list[jax.Array],
    traces: Traces,
    sizes: dict[str, int],
) -> Ladder:
    """Pull the rows of all nodes above, and their own, down through a ladder.

    Args:
      parts: its nodes, after the segment.
      nodes: their numbers.
      dy: cotangent of the highest one's output at every step; empty for zero.
      end: per real leaf of a carry, (nodes, rows, ...) cotangents of the last carries.
    """
    lowest = nodes[0]
    node, name = plan.nodes[lowest], plan.name(lowest, lowest)
    flags = parts[0].flags
    recurrence = Past.FULL if plan.full_jacobian(lowest) else Past.LOCAL

    def full(ct: Leaves) -> list[jax.Array]:
        zeros = [Lifted(jnp.zeros(*leaf)) for leaf in zip(node.output.shapes, node.output.dtypes, strict=True)]
        pairs = zip(ct or [None] * len(zeros), zeros, strict=True)
        wide = [broadcast(zero if x is None else x, "crb", sizes).astype(zero.value.dtype) for x, zero in pairs]
        return vary_like(wide, parts[0].run)

    def body(dy: list[jax.Array], each: PyTree) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
        params, u, run, end, own = each
        values = with_inputs(node.program, parameter_values(node.program, params), u)
        part = NodeSegment(node, params, values, run, u, flags, slots_wanted=False)
        arrived: Leaves = [Lifted(leaf, "crb") for leaf in dy]
        back = part.back(recurrence, arrived, [Lifted(leaf, "r") for leaf in end], sizes["r"])
        start = jnp.swapaxes(vector(node.carry, plan.dtype, back.start, "rb", sizes), 0, 1)
        found = part.parameters(back, "rb", sizes)
        inside = [rows_of(found[i], node.params.sizes[i], sizes, plan.dtype) for i in plan.trained[lowest]]
        columns = jnp.concatenate(inside, axis=-1)
        if own is not None:
            columns = columns + own_columns(plan, lowest, plan.trained[lowest], start, {name: own})
        return full(back.input), (start, columns)

    own = [traces.get(plan.name(p, p)) for p in nodes]
    each = [(part.params, part.input, part.run, trace) for part, trace in zip(parts, own, strict=True)]
    params, inputs, runs, own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    bottom, (start, columns) = lax.scan(body, full(dy), (params, inputs, runs, end, own), len(nodes), reverse=True)
    return Ladder(start, columns, [Lifted(leaf, "crb") for leaf in bottom])
