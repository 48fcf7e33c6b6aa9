"""All traces of a network, in the state of a learner: their shapes, and operations on whole ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.traces import local, projected
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.depth import DeepTraces, kept_pairs
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.projected import ProjectedCarry


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
    for (v, k), kind in plan.filtered.items():
        traces[plan.name(v, k)] = tuple(array(batch, len(kind.decays), block.columns) for block in kind.blocks)
    if plan.projection is not None:
        rank, numbers = plan.projection.rank, plan.projection.numbers
        columns = {
            plan.graph.nodes[k].name: [
                array(batch, rank, *plan.leaf_shapes(k)[i]) for i in plan.projection.whole(k, plan.trained[k])
            ]
            for k in plan.projection.sources
        }
        factored = {
            vertex.name: layout.shapes(batch, plan.dtype)
            for vertex, layout in zip(plan.graph.nodes, plan.projection.layouts, strict=True)
            if layout is not None
        }
        traces[projected.NAME] = ProjectedCarry(columns, factored, *(array(rank, numbers) for _ in range(3)))
    return traces


def first_traces(plan: Plan, batch: int) -> Traces:
    """Zeros; a projected carry's basis is random."""
    traces = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), trace_shapes(plan, batch))
    if plan.projection is not None:
        basis = projected.random_basis(jax.random.key(0), plan.projection.rank, plan.projection.numbers, plan.dtype)
        three = (jnp.array(basis, copy=True) for _ in range(3))  # no buffer twice: a state may be donated
        traces[projected.NAME] = ProjectedCarry(*traces[projected.NAME][:2], *three)
    return traces


def reset_traces(where: jax.Array, traces: Traces) -> Traces:
    """Traces, as they stand in the state, that are zero for some examples: (batch,)."""
    return select_traces(where, jax.tree.map(jnp.zeros_like, traces), traces)


def select_traces(where: jax.Array, traces: Traces, others: Traces) -> Traces:
    """Per example, ``traces`` where true and ``others`` elsewhere."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        # Arrays of a node with depth have an axis of layers, or of pairs of them, first.
        front = a.ndim - 3
        return jnp.where(where.reshape((1,) * front + (-1,) + (1,) * 2), a, b)

    return {
        name: projected.select(where, trace, others[name])
        if isinstance(trace, ProjectedCarry)
        else jax.tree.map(choose, trace, others[name])
        for name, trace in traces.items()
    }


def split_slots(plan: Plan, traces: Traces) -> Traces:
    """Own local traces as one array (batch, *leaf) per slot, and filtered ones per constant.

    See local.py.
    """
    split = dict(traces)
    for v, own in _whole(plan, traces).items():
        shapes = plan.nodes[v].params.shapes
        split[plan.name(v, v)] = tuple(
            local.split(block, shapes[block.leaves[0]], trace) if block.kind is Rows.LOCAL else trace
            for block, trace in zip(plan.own[v], own, strict=True)
        )
    for (v, k), kind in plan.filtered.items():
        shapes, rows = plan.nodes[k].params.shapes, len(kind.decays)
        pairs = zip(kind.blocks, traces[plan.name(v, k)], strict=True)
        split[plan.name(v, k)] = tuple(local.split(b._replace(rows=rows), shapes[b.leaves[0]], t) for b, t in pairs)
    return split


def _whole(plan: Plan, traces: Traces) -> dict[int, tuple[jax.Array, ...]]:
    """The own traces of nodes without depth; those with depth are held as they stand."""
    names = {v: plan.name(v, v) for v, vertex in enumerate(plan.graph.nodes) if vertex.depth is None}
    return {v: traces[name] for v, name in names.items() if name in traces}


def join_slots(plan: Plan, traces: Traces) -> Traces:
    """The inverse of ``split_slots``."""
    joined = dict(traces)
    for v, own in _whole(plan, traces).items():
        pairs = zip(plan.own[v], own, strict=True)
        joined[plan.name(v, v)] = tuple(local.join(t) if b.kind is Rows.LOCAL else t for b, t in pairs)
    return joined | {
        name: tuple(map(local.join, traces[name])) for name in (plan.name(*pair) for pair in plan.filtered)
    }


def without_examples(plan: Plan, where: jax.Array, traces: Traces) -> Traces:
    """Traces, as ``split_slots`` gives them, that are zero for some examples: (batch,)."""
    deep = [plan.graph.nodes[v].depth is not None for v in range(len(plan.nodes))]
    layers_first = {name for v, d in enumerate(deep) if d for name in plan.trace_names(v)}

    def without(name: str, trace: PyTree) -> PyTree:
        if isinstance(trace, ProjectedCarry):
            return projected.without_examples(where, trace)
        front = (1,) if name in layers_first else ()
        return jax.tree.map(
            lambda t: jnp.where(where.reshape(*front, -1, *(1,) * (t.ndim - 1 - len(front))), 0, t), trace
        )

    return {name: without(name, trace) for name, trace in traces.items()}
