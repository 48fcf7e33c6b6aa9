"""What traces make of a cotangent (``lambda . S``, eq. 4) or of rows of them (``M S``), whatever they are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr.computed_once import computed_once
from deepeprop_jax.traces import dense, local, low_rank
from deepeprop_jax.traces.block import Block, Rows, add_columns, over_leaf
from deepeprop_jax.traces.depth import DeepTraces, band_gradient
from deepeprop_jax.traces.kinds import advance, push
from deepeprop_jax.traces.plan import Plan, Traces


def is_kept(plan: Plan, v: int, k: int, traces: Traces) -> bool:
    """Whether there is a trace of node k's parameters in node v, of any kind."""
    return plan.name(v, k) in traces or (v == k and plan.low_rank[k] is not None)


def cross_gradient(plan: Plan, v: int, k: int, cotangent: jax.Array, traces: Traces) -> jax.Array:
    """lambda^v . S^{v,k} as (layers of k, columns); the cotangent (batch, n), or (L, batch, n) where v has depth."""
    trace, pair = traces[plan.name(v, k)], plan.pairs[v, k]
    if plan.graph.nodes[v].depth is None:
        part = dense.contract(cotangent, trace)
    else:
        part = jnp.einsum("lbn,lbnp->p", cotangent[: pair.layers], trace)
    missing = plan.all_columns(k) - pair.columns
    return jnp.pad(part, (missing, 0)).reshape(plan.depth(k), plan.columns[k])


def own_gradient(plan: Plan, k: int, cotangent: jax.Array, traces: Traces, split: bool) -> list[jax.Array]:
    """``lambda . S`` of the own trace of a node, or of one layer of it, per real parameter leaf.

    Args:
      cotangent: (batch, n).
      split: whether local rows stand as ``state.split_slots`` gives them.
    """
    node, layout = plan.nodes[k], plan.low_rank[k]
    grads = [jnp.zeros(shape, plan.dtype) for shape in node.params.shapes]
    by_unit = to_grid(cotangent, node.units)
    if layout is not None:
        parts = low_rank.contract(layout, traces[plan.low_rank_name(k)], by_unit)
        for block, part in zip(layout.blocks, parts, strict=True):
            add_columns(node.params, grads, block.leaves, part.ravel())
    by_unit = by_unit if split else computed_once(by_unit)
    for block, trace in zip(plan.own[k], traces.get(plan.name(k, k), ()), strict=True):
        if block.kind is Rows.DENSE:
            part = dense.contract(cotangent, trace)
        else:
            shape = node.params.shapes[block.leaves[0]]
            if split:
                part = local.contract_split(over_leaf(by_unit, block, shape), trace)
            else:
                part = local.contract(block, shape, by_unit, trace).ravel()
        add_columns(node.params, grads, block.leaves, part)
    return grads


def own_gradient_of_layers(plan: Plan, k: int, cotangent: jax.Array, traces: Traces) -> jax.Array:
    """``lambda . S`` of all influences between a node's own layers, (L, columns).

    Args:
      cotangent: (L, batch, n); also of one layer alone, without a band.
    """
    name, depth = plan.name(k, k), cotangent.shape[0]
    own = traces.get(name, DeepTraces((), None))
    held = {name: own.own} | {n: traces[n] for n in (plan.low_rank_name(k),) if n in traces}
    grads = jax.vmap(lambda c, held: own_gradient(plan, k, c, held, split=False))(cotangent, held)
    nothing = [jnp.zeros((depth, 0), plan.dtype)]
    total = jnp.concatenate([grads[i].reshape(depth, -1) for i in plan.trained[k]] or nothing, axis=-1)
    return total if own.band is None else total + band_gradient(cotangent, own.band, plan.bands[k])


def own_columns(
    plan: Plan, k: int, leaves: tuple[int, ...], matrix: jax.Array, traces: Traces, own_units: bool = False
) -> jax.Array:
    """``M S^{k,k}``, (batch, rows, columns of ``leaves``).

    Args:
      matrix: M, (batch, rows, n); with ``own_units`` the unit-local blocks of one, (batch, K, K, units), and the leaves
        are those with dense rows.
    """
    node = plan.nodes[k]
    parts: dict[int, jax.Array] = {}
    for block, rows in _own_rows(plan, k, traces):
        if not set(block.leaves) <= set(leaves):
            continue
        part = (advance if own_units else push)(node, block, matrix, rows)
        start = 0
        for i in block.leaves:
            parts[i] = part[..., start : start + node.params.sizes[i]]
            start += node.params.sizes[i]
    lead = (matrix.shape[0], node.carry.size if own_units else matrix.shape[1])
    zeros = {i: jnp.zeros((*lead, node.params.sizes[i]), plan.dtype) for i in leaves}
    return jnp.concatenate([parts.get(i, zeros[i]) for i in leaves], axis=-1)


def _own_rows(plan: Plan, k: int, traces: Traces) -> list[tuple[Block, jax.Array]]:
    """Node k's own trace, (batch, rows, columns) per block."""
    pairs = zip(plan.own[k], traces.get(plan.name(k, k), ()), strict=True)
    found = [(block, local.join(trace) if block.kind is Rows.LOCAL else trace) for block, trace in pairs]
    layout = plan.low_rank[k]
    if layout is not None:
        whole = low_rank.multiplied_out(layout, traces[plan.low_rank_name(k)])
        found += zip(layout.blocks, whole, strict=True)
    return found
