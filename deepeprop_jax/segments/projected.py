"""The projected carry over the C steps of a segment, whose own credit is exact.

    grad^k  =  inside  +  (λ A) V^k                     λ: cotangent of all carries at the segment's start
    V^k     ←  Uᵀ M A V^k  +  Uᵀ ∂h_end/∂θ^k inside     M = ∂h_end/∂h_start

The R directions U are pulled back from the segment's end as rows, through all nodes at once: R reverse passes over what
the segment's losses go back through as well, and no Jacobian.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.segments import outer
from deepeprop_jax.segments.depth import DeepBack, DeepSegment, LayerEnd
from deepeprop_jax.segments.kept import everything
from deepeprop_jax.segments.network import Flow, Segment, start_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.traces import low_rank, projected
from deepeprop_jax.traces.low_rank import LowRank
from deepeprop_jax.traces.plan import Traces
from deepeprop_jax.traces.products import own_columns
from deepeprop_jax.traces.projected import ProjectedCarry


def signal(segment: Segment, flow: Flow, axes: str) -> jax.Array:
    """What a flow finds at the segment's start in all carries together, (*axes, N)."""
    plan, seen = segment.plan, everything(segment.plan)
    parts = []
    for v, node in enumerate(plan.nodes):
        back, size = flow.through(v, seen), plan.depth(v) * node.carry.size
        lead = tuple(flow.sizes[axis] for axis in axes)
        if back is None or not back.start or not size:
            parts.append(jnp.zeros((*lead, size), plan.dtype))
            continue
        found = start_of(segment, v, back, axes, flow.sizes)
        parts.append(jnp.moveaxis(found, 0, -2).reshape(*lead, -1) if isinstance(back, DeepBack) else found)
    return jnp.concatenate(parts, axis=-1)


def flow_of(segment: Segment, rows: jax.Array, axis: str) -> Flow:
    """Cotangents of all last carries together, (rows or batch, N), on their way down.

    Args:
      axis: which of the two, "r" or "b".
    """
    plan, ends = segment.plan, {}
    for v, (node, part) in enumerate(zip(plan.nodes, segment.nodes, strict=True)):
        if node.carry.size:
            assert plan.projection is not None
            ends[v] = _end(part, plan.projection.of_node(v, rows), axis)
    return Flow(segment, [], ends, rows=len(rows) if axis == "r" else 1, exact=True)


def _end(part: NodeSegment | DeepSegment, rows: jax.Array, axis: str) -> Leaves | LayerEnd:
    view = part.node.carry
    if isinstance(part, NodeSegment):
        pairs = zip(view.unflatten(rows), view.dtypes, strict=True)
        return [Lifted(leaf.astype(dtype), axis) for leaf, dtype in pairs]
    by_layer = jnp.moveaxis(rows.reshape(len(rows), part.depth, view.size), 1, 0)
    leaves = [leaf.astype(dtype) for leaf, dtype in zip(view.unflatten(by_layer), view.dtypes, strict=True)]
    return LayerEnd(leaves, None, axis)


def along(segment: Segment, flow: Flow, held: ProjectedCarry, axes: str) -> jax.Array:
    """What a flow finds at the segment's start, times the lift that the columns are held in: (*axes, R)."""
    return signal(segment, flow, axes) @ held.held.T


def add_gradient(segment: Segment, flow: Flow, held: ProjectedCarry, grads: list[list[jax.Array]]) -> None:
    """Add ``(λ A) V^k`` to the gradient of every node k.

    Args:
      flow: from the segment's losses.
      grads: per node and real parameter leaf.
    """
    plan = segment.plan
    assert plan.projection is not None
    toward = along(segment, flow, held, "b")
    for k in plan.projection.sources:
        name, layout = plan.graph.nodes[k].name, plan.projection.layouts[k]
        leaves = plan.projection.whole(k, plan.trained[k])
        parts = [projected.contract(toward, leaf) for leaf in held.columns[name]]
        if layout is not None:
            leaves += [i for block in layout.blocks for i in block.leaves]
            parts += low_rank.contract(layout, held.factored[name], toward)
        for i, part in zip(leaves, parts, strict=True):
            grads[k][i] = grads[k][i] + part


def advance(segment: Segment, traces: Traces, new: Traces) -> ProjectedCarry:
    """To the segment's end, where the columns are held in the basis of now.

    Args:
      traces, new: all traces at the segment's start, and a node's own ones at its end.
    """
    plan, seen = segment.plan, everything(segment.plan)
    held: ProjectedCarry = traces[projected.NAME]
    assert plan.projection is not None
    if not plan.projection.rank:
        return held
    flow = flow_of(segment, held.directions, "r")
    mixing = jnp.swapaxes(along(segment, flow, held, "rb"), 0, 1)
    columns: projected.Columns = {}
    factored: dict[str, LowRank] = {}
    for k in plan.projection.sources:
        name = plan.graph.nodes[k].name
        back = flow.through(k, seen)
        added = _inside(segment, flow, k, back)
        if plan.own[k]:
            _add_own(segment, flow, k, held.directions, back, added, traces, new)
        columns[name] = [
            projected.advance(mixing, leaf, added.get(i))
            for i, leaf in zip(plan.projection.whole(k, plan.trained[k]), held.columns[name], strict=True)
        ]
        layout, part = plan.projection.layouts[k], segment.nodes[k]
        if layout is not None:
            assert isinstance(part, NodeSegment)
            steps: Leaves = back.steps if isinstance(back, Back) else [None] * len(part.node.carry.shapes)
            values = part.linear_values(part.program.to_params, steps)
            deltas = outer.deltas(layout, values, flow.sizes, plan.dtype)
            factors = outer.factors(layout, [part.read(z) for z in layout.factors], flow.sizes, plan.dtype)
            factored[name] = low_rank.advance(layout, held.factored[name], mixing, deltas, factors)
    return held._replace(columns=columns, factored=factored, held=held.lift)


def _inside(segment: Segment, flow: Flow, k: int, back: Back | DeepBack | None) -> dict[int, jax.Array]:
    """``Uᵀ ∂h_end/∂θ^k`` of the segment's own steps, by real parameter leaf: (batch, R, [layers,] ...)."""
    node, part, dtype = segment.plan.nodes[k], segment.nodes[k], segment.plan.dtype
    if back is None:
        return {}
    if isinstance(back, DeepBack):
        assert back.rows is not None
        rows = jnp.transpose(back.rows, (1, 2, 0, 3)).astype(dtype)
        return dict(enumerate(node.params.unflatten(rows)))
    assert isinstance(part, NodeSegment)
    found = part.parameters(back, "rb", flow.sizes)
    rows = {i: broadcast(x, "rb", flow.sizes).astype(dtype) for i, x in enumerate(found) if x is not None}
    return {i: jnp.swapaxes(x, 0, 1) for i, x in rows.items()}


def _add_own(
    segment: Segment,
    flow: Flow,
    k: int,
    directions: jax.Array,
    back: Back | DeepBack | None,
    added: dict[int, jax.Array],
    traces: Traces,
    new: Traces,
) -> None:
    """Add ``Uᵀ M E − Uᵀ E_end``: the columns hold what a node's own trace E does not."""
    plan = segment.plan
    node, leaves, sizes = plan.nodes[k], plan.trained[k], flow.sizes
    assert plan.projection is not None
    rows = jnp.broadcast_to(plan.projection.of_node(k, directions), (sizes["b"], len(directions), node.carry.size))
    found = -own_columns(plan, k, leaves, rows, new)
    if back is not None and back.start:
        matrix = jnp.swapaxes(start_of(segment, k, back, "rb", sizes), 0, 1)
        found = found + own_columns(plan, k, leaves, matrix, traces)
    start = 0
    for i in leaves:
        part = found[..., start : start + node.params.sizes[i]]
        part = part.reshape(*part.shape[:2], *node.params.shapes[i])
        added[i] = added[i] + part if i in added else part
        start += node.params.sizes[i]
