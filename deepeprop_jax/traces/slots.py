"""A node's own local traces as the segment engine holds them: one array (batch, *leaf) per slot of a unit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr import thin
from deepeprop_jax.traces.block import Block, spread
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import Traces


def split_slots(plan: Plan, traces: Traces) -> Traces:
    """Own local traces as one array (batch, *leaf) per slot.

    XLA on a CPU would copy an array (batch, K, |leaf|) at every segment, and divide for every entry of (batch, |leaf|)
    to find its unit.
    """
    split = dict(traces)
    for v, own in _whole(plan, traces).items():
        shapes = plan.nodes[v].params.shapes
        split[plan.name(v, v)] = tuple(
            split_block(block, shapes[block.leaves[0]], trace) if block.kind == "local" else trace
            for block, trace in zip(plan.own[v], own, strict=True)
        )
    return split


def _whole(plan: Plan, traces: Traces) -> dict[int, Any]:
    """The own traces of nodes without depth; those with depth are held as they stand."""
    names = {v: plan.name(v, v) for v, vertex in enumerate(plan.graph.nodes) if vertex.depth is None}
    return {v: traces[name] for v, name in names.items() if name in traces}


def split_block(block: Block, shape: tuple[int, ...], trace: jax.Array) -> list[jax.Array]:
    """(batch, K, |leaf|) as one array (batch, *leaf) per slot."""
    return [trace[:, k].reshape(-1, *shape) for k in range(block.rows)]


def stack_slots(rows: list[jax.Array]) -> jax.Array:
    """(batch, K, |leaf|)."""
    return jnp.stack([row.reshape(row.shape[0], -1) for row in rows], axis=1)


def join_slots(plan: Plan, traces: Traces) -> Traces:
    """The inverse of ``split_slots``."""
    joined = dict(traces)
    for v, own in _whole(plan, traces).items():
        pairs = zip(plan.own[v], own, strict=True)
        joined[plan.name(v, v)] = tuple(stack_slots(t) if b.kind == "local" else t for b, t in pairs)
    return joined


def without_examples(plan: Plan, where: jax.Array, traces: Traces) -> Traces:
    """Traces, as ``split_slots`` gives them, that are zero for some examples: (batch,)."""
    deep = [plan.graph.nodes[v].depth is not None for v in range(len(plan.nodes))]
    layers_first = {name for v, d in enumerate(deep) if d for name in plan.trace_names(v)}

    def without(name: str, trace: Any) -> Any:
        front = (1,) if name in layers_first else ()
        return jax.tree.map(
            lambda t: jnp.where(where.reshape(*front, -1, *(1,) * (t.ndim - 1 - len(front))), 0, t), trace
        )

    return {name: without(name, trace) for name, trace in traces.items()}


WRITTEN_OUT = 32
"""Up to this many examples a sum over them is written out."""


def over_leaf(values: jax.Array, block: Block, shape: tuple[int, ...]) -> jax.Array:
    """(batch, K, units) given to the entries of a leaf, (batch, K, *leaf); size 1 along axes that do not matter."""
    lead = values.shape[:-1]
    if block.unit is not None and block.unit.size:
        line = thin.core(thin.compact(block.unit.reshape(shape)))
        first = int(line.flat[0])
        if line.size in shape and np.array_equal(line.ravel(), np.arange(first, first + line.size)):
            for axis in range(len(shape)):
                if line.shape[axis] == shape[axis] == line.size:
                    used = jax.lax.slice_in_dim(values, first, first + line.size, axis=values.ndim - 1)
                    return used.reshape(*lead, *line.shape)
    return spread(values, block.unit).reshape(*lead, *shape)


def contract_slots(cotangent: jax.Array, rows: list[jax.Array]) -> jax.Array:
    """``lambda . S`` of a local trace, summed over the batch: (batch, K, *leaf) and K times (batch, *leaf)."""
    if cotangent.shape[0] > WRITTEN_OUT:
        terms = [(cotangent[:, k] * row).sum(axis=0) for k, row in enumerate(rows)]
    else:
        # One pass over the trace: XLA fuses the products of a written-out sum, but not those of a sum over examples.
        terms = [cotangent[b, k] * row[b] for k, row in enumerate(rows) for b in range(cotangent.shape[0])]
    return functools.reduce(jnp.add, terms).ravel()


def advance_slot(row: jax.Array, trace: list[jax.Array], added: jax.Array | None) -> jax.Array:
    """One slot's trace: a row of the product of all D, (batch, K, *leaf), times all slots, and what is new."""
    terms = [row[:, k] * old for k, old in enumerate(trace)]
    return functools.reduce(jnp.add, terms if added is None else [*terms, added])
