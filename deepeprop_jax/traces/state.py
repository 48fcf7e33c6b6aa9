"""All traces of a network, in the state of a learner: their shapes, and operations on whole ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.traces.depth import DeepTraces, kept_pairs
from deepeprop_jax.traces.plan import Plan

Traces = dict[str, Any]
"""Per kept pair, ``"v <- k"``: the node's own traces (a tuple with one array per block, or ``DeepTraces``), or the
influence across nodes as one array (batch, n, columns), with a leading axis of layers where v has depth."""


def trace_shapes(plan: Plan, batch: int) -> Traces:
    """Shape and dtype of every trace."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, plan.dtype)

    traces: Traces = {}
    for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        layers = () if vertex.depth is None else (vertex.depth,)
        own = tuple(array(*layers, batch, block.rows, block.columns) for block in plan.own[v])
        between = kept_pairs(plan.depth(v), plan.bands[v]).target.size
        band = array(between, batch, node.carry.size, plan.columns[v]) if between else None
        if own or band is not None:
            traces[plan.name(v, v)] = own if vertex.depth is None else DeepTraces(own, band)
        layout = plan.low_rank[v]
        if layout is not None:
            shapes = layout.shapes(batch, plan.dtype)
            traces[plan.low_rank_name(v)] = type(shapes)(*(array(*layers, *leaf.shape) for leaf in shapes))
    for (v, k), pair in plan.pairs.items():
        layers = () if plan.graph.nodes[v].depth is None else (pair.layers,)
        traces[plan.name(v, k)] = array(*layers, batch, plan.nodes[v].carry.size, pair.columns)
    return traces


def select_traces(where: jax.Array, traces: Traces, others: Traces) -> Traces:
    """Per example, ``traces`` where true and ``others`` elsewhere."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        # Arrays of a node with depth have an axis of layers, or of pairs of them, first.
        front = a.ndim - 3
        return jnp.where(where.reshape((1,) * front + (-1,) + (1,) * 2), a, b)

    return jax.tree.map(choose, traces, others)


def cross_gradient(plan: Plan, v: int, k: int, cotangent: jax.Array, traces: Traces) -> jax.Array:
    """lambda^v . S^{v,k} as (layers of k, columns); the cotangent (batch, n), or (L, batch, n) where v has depth."""
    trace, pair = traces[plan.name(v, k)], plan.pairs[v, k]
    if plan.graph.nodes[v].depth is None:
        part = jnp.einsum("bn,bnp->p", cotangent, trace)
    else:
        part = jnp.einsum("lbn,lbnp->p", cotangent[: pair.layers], trace)
    missing = plan.all_columns(k) - pair.columns
    return jnp.pad(part, (missing, 0)).reshape(plan.depth(k), plan.columns[k])
