"""The gradient of a segment's losses: what its own steps give, and what the traces bring to its start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.batched import Leaves, Lifted
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments import filtered, joint, projected
from deepeprop_jax.segments.depth import DeepBack
from deepeprop_jax.segments.kept import Kept, everything, groups, kept_by, nodes_of
from deepeprop_jax.segments.network import Flow, Segment, start_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.traces.block import add_columns
from deepeprop_jax.traces.plan import Given, Plan, Traces
from deepeprop_jax.traces.products import cross_gradient, is_kept, own_gradient, own_gradient_of_layers
from deepeprop_jax.traces.projected import NAME


def as_cotangents(plan: Plan, given: Given) -> dict[int, Leaves]:
    """Signals per real leaf."""
    return {v: [Lifted(leaf, "cb") for leaf in plan.nodes[v].output.split_cotangent(s)] for v, s in given.items()}


def segment_gradient(
    segment: Segment, traces: Traces, dy: PyTree, given: Given, exact: bool = False, split: bool = True
) -> list[list[jax.Array]]:
    """``inside + Σ_v λ^v · S^{v,k}`` (eq. 4) for every node k, per real parameter leaf.

    S^{v,k} is the influence of k's parameters on v's carry at the segment's start, and λ^v the cotangent of that carry
    under the losses of the segment (eq. 5); v runs over the nodes for which it is kept.

    Args:
      traces: at the segment's start.
      dy: cotangent of the outputs at every step, in ``jax.grad``'s convention.
      given: the same of some nodes' outputs, in place of what would come from above.
      exact: whether credit inside the segment is exact; beside a projected carry it is.
      split: whether own traces with local rows stand as ``state.split_slots`` gives them, or as in the state.

    Returns:
      In the traces' dtype, with a leading axis of layers where a node has depth.
    """
    plan = segment.plan
    leaves: Leaves = [Lifted(leaf, "cb") for leaf in plan.output.split_cotangent(dy)]
    exact = exact or plan.projection is not None
    flow = Flow(segment, leaves, exact=exact, given=as_cotangents(plan, given))
    found = []
    for k in range(len(plan.nodes)):
        if exact:  # all layers of a source see the same
            found.append(_of_source(segment, flow, k, everything(plan), traces, split))
            continue
        parts = [(layers, _of_source(segment, flow, k, kept, traces, split)) for layers, kept in groups(plan, k)]
        if len(parts) == 1:
            found.append(parts[0][1])
        else:
            by_leaf = zip(*([leaf[np.array(layers)] for leaf in part] for layers, part in parts), strict=True)
            found.append([jnp.concatenate(leaf) for leaf in by_leaf])
    if plan.projection is not None:
        projected.add_gradient(segment, flow, traces[NAME], found)
    return found


def _of_source(segment: Segment, flow: Flow, k: int, seen: Kept, traces: Traces, split: bool) -> list[jax.Array]:
    """The gradient of node k, where its parameters see ``seen`` through time."""
    plan = segment.plan
    back = flow.through(k, seen)
    zeros = [jnp.zeros(shape, plan.dtype) for shape in plan.leaf_shapes(k)]
    if back is None or not plan.trained[k]:
        return zeros
    grads = _inside(segment, k, back, zeros, flow.sizes)
    columns = jnp.zeros((plan.depth(k), plan.columns[k]), plan.dtype)
    for v in nodes_of(kept_by(plan, k)):
        through = flow.through(v, seen)
        if not is_kept(plan, v, k, traces) or through is None or not through.start:
            continue
        signal = start_of(segment, v, through, "b", flow.sizes)  # λ^v
        if (v, k) in plan.filtered:
            for leaf, part in filtered.gradient(segment, v, k, signal, traces, split).items():
                add_columns(plan.nodes[k].params, grads, (leaf,), part)
        elif v != k:
            columns = columns + cross_gradient(plan, v, k, signal, traces)
        elif plan.graph.nodes[k].depth is None:
            grads = [a + b for a, b in zip(grads, own_gradient(plan, k, signal, traces, split), strict=True)]
        else:
            columns = columns + own_gradient_of_layers(plan, k, signal, traces)
    if joint.name_of(plan, k) in traces:
        columns = columns + joint.gradient(segment, flow, k, flow.exact, traces)[None]
    add_columns(plan.nodes[k].params, grads, plan.trained[k], columns)
    return [grad if i in plan.trained[k] else zeros[i] for i, grad in enumerate(grads)]


def _inside(
    segment: Segment, k: int, back: Back | DeepBack, zeros: list[jax.Array], sizes: dict[str, int]
) -> list[jax.Array]:
    """What the steps of the segment give."""
    part, dtype = segment.nodes[k], segment.plan.dtype
    if isinstance(back, DeepBack):
        return [leaf.astype(dtype) for leaf in back.params]
    assert isinstance(part, NodeSegment)
    pairs = zip(zeros, part.parameters(back, "", sizes), strict=True)
    return [zero if x is None else x.value.astype(dtype) for zero, x in pairs]
