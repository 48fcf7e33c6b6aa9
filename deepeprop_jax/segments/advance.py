"""All traces, from a segment's start to its end.

A node's own local traces have one row per slot of a unit (own.py); dense rows and influences across nodes have
one per carry number (influence.py); a node with depth has both, for every layer (depth_advance.py).
"""

from __future__ import annotations

from deepeprop_jax.segments import joint
from deepeprop_jax.segments.cotangents import unit_vectors
from deepeprop_jax.segments.depth import DeepSegment
from deepeprop_jax.segments.depth_advance import advance_deep
from deepeprop_jax.segments.flow import Flow
from deepeprop_jax.segments.influence import influence
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.segments.own import advance_local, advance_low_rank
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.plan import Traces


def advance_traces(segment: Segment, traces: Traces) -> Traces:
    """All traces, from the segment's start to its end."""
    plan = segment.plan
    new: Traces = joint.update(segment, traces)
    for v, (node, part) in enumerate(zip(plan.nodes, segment.nodes, strict=True)):
        if isinstance(part, DeepSegment):
            new |= advance_deep(segment, v, part, traces)
            continue
        name, layout = plan.name(v, v), plan.low_rank[v]
        own = list(traces.get(name, ()))
        blocks = plan.own[v] if own else ()
        local = [i for i, block in enumerate(blocks) if block.kind is Rows.LOCAL]
        moved = advance_local(part, [blocks[i] for i in local], [own[i] for i in local], plan.dtype)
        for i, trace in zip(local, moved, strict=True):
            own[i] = trace
        if layout is not None:
            new[plan.low_rank_name(v)] = advance_low_rank(part, layout, traces[plan.low_rank_name(v)], plan.dtype)
        dense = [i for i, block in enumerate(blocks) if block.kind is Rows.DENSE]
        sources = [k for k in range(v) if plan.name(v, k) in traces]
        if dense or sources:
            flow = Flow(segment, [], (v, unit_vectors(node.carry)), rows=node.carry.size)
            for i in dense:
                own[i] = influence(segment, flow, v, v, blocks[i].leaves, traces)
            new |= {plan.name(v, k): influence(segment, flow, v, k, plan.trained[k], traces) for k in sources}
        if name in traces:
            new[name] = tuple(own)
    return new
