"""Influences with a row per number of a carry, from a segment's start to its end.

    S^{v,k}_end = Σ_w M^{v,w} S^{w,k}_start + added,    M^{v,w} = ∂h^v_end/∂h^w_start,    added = ∂h^v_end/∂θ^k inside

Every unit vector on v's last carry is pulled back through the segment, to every kept node w and to the parameters of k.
For C = 1 it is eq. 9 with eq. 10 and 11 put in, the way up multiplied out first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.segments.cotangents import rows_of
from deepeprop_jax.segments.depth import DeepBack
from deepeprop_jax.segments.kept import Kept, groups, kept_by, nodes_of
from deepeprop_jax.segments.network import Flow, Segment, start_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.segments.own import recurrence
from deepeprop_jax.traces import dense
from deepeprop_jax.traces.depth import columns_of, push_pairs
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.products import cross_gradient, is_kept, own_columns, own_gradient_of_layers


def influence(segment: Segment, flow: Flow, v: int, k: int, leaves: tuple[int, ...], traces: Traces) -> jax.Array:
    """S^{v,k}_end: rows of node v (of one of its layers), columns of node k's ``leaves``, (batch, n_v, columns).

    Where k has depth, ``leaves`` are all that are trained; the columns are those of its uppermost layers, as many as
    the pair keeps, side by side. Nodes are in order from below, so that v owes nothing to those after it. M^{v,w} is
    (batch, n_v, n_w); but M^{v,v} through D is its blocks, (batch, K, K, units), and ``M S`` is ``advance`` then.

    Args:
      flow: from unit vectors on v's last carry.
    """
    plan, sizes = segment.plan, flow.sizes
    if plan.graph.nodes[k].depth is not None:
        parts = [(layers, influence_of_layers(segment, flow, k, traces, kept)) for layers, kept in groups(plan, k, v)]
        total = jnp.zeros_like(parts[0][1])
        for layers, part in parts:
            total = part if len(parts) == 1 else total.at[np.array(layers)].set(part[np.array(layers)])
        return jnp.moveaxis(total[plan.depth(k) - plan.pairs[v, k].sources :], 0, 2).reshape(*total.shape[1:3], -1)
    kept = kept_by(plan, k)
    total = _inside(segment, flow, k, leaves, kept)
    for w in nodes_of(kept):
        through = flow.through(w, kept) if w <= v else None
        if not is_kept(plan, w, k, traces) or through is None or not through.start:
            continue
        if isinstance(through, DeepBack):
            total = total + _by_example(plan, w, k, start_of(segment, w, through, "rb", sizes), traces)[0]
            continue
        part = segment.nodes[w]
        own_units = w == v and not plan.full_jacobian(v)
        if own_units and isinstance(part, NodeSegment):
            matrix = recurrence(part, plan.dtype)
        else:
            matrix = jnp.swapaxes(start_of(segment, w, through, "rb", sizes), 0, 1)  # (batch, rows, n_w)
        if w == k:
            total = total + own_columns(plan, k, leaves, matrix, traces, own_units)
        elif own_units:
            total = total + dense.advance(plan.nodes[w].units, matrix, traces[plan.name(w, k)])
        else:
            total = total + dense.push(matrix, traces[plan.name(w, k)])
    return total


def influence_of_layers(
    segment: Segment, flow: Flow, k: int, traces: Traces, kept: Kept, top: jax.Array | None = None
) -> jax.Array:
    """What rows owe to all trained parameters of a node k with depth, layer by layer: (L, batch, rows, columns).

    Args:
      kept: what the layers see through time.
      top: the highest layer of k that the rows may owe anything to; None for all.
    """
    plan, sizes, name = segment.plan, flow.sizes, segment.plan.name(k, k)
    back = flow.through(k, kept)
    total = jnp.zeros((plan.depth(k), sizes["b"], sizes["r"], plan.columns[k]), plan.dtype)
    if isinstance(back, DeepBack) and back.rows is not None:
        every = tuple(range(len(plan.nodes[k].params.sizes)))
        total = columns_of(plan.nodes[k], plan.trained[k], back.rows, every).astype(plan.dtype)
    for w in nodes_of(kept):
        through = flow.through(w, kept)
        if not is_kept(plan, w, k, traces) or through is None or not through.start:
            continue
        start = start_of(segment, w, through, "rb", sizes)
        if w != k:
            total = total + _by_example(plan, w, k, start, traces)
            continue
        highest = jnp.asarray(plan.depth(k) - 1) if top is None else top
        if name in traces and traces[name].band is not None:
            total = push_pairs(start, traces[name].band, plan.bands[k], total, highest)
        total = _add_own_of_layers(plan, k, start, total, traces, highest)
    return total


def _add_own_of_layers(
    plan: Plan, k: int, start: jax.Array, total: jax.Array, traces: Traces, top: jax.Array
) -> jax.Array:
    """Add ``M S`` of each layer's influence on itself, one layer at a time.

    Args:
      start: (L, rows, batch, n).
      total: (L, batch, rows, columns).
    """
    names = plan.name(k, k), plan.low_rank_name(k)
    held = {name: traces[name] for name in names if name in traces}
    if names[0] in held:
        held[names[0]] = held[names[0]]._replace(band=None)

    def layer(total: jax.Array, now: tuple[jax.Array, jax.Array, Traces]) -> tuple[jax.Array, None]:
        index, start, held = now
        row, held = jax.tree.map(lambda leaf: leaf[None], (start, held))
        found = lax.cond(index <= top, lambda: _by_example(plan, k, k, row, held)[0], lambda: jnp.zeros_like(total[0]))
        old = lax.dynamic_index_in_dim(total, index, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + found, index, 0), None

    return lax.scan(layer, total, (jnp.arange(total.shape[0]), start, held))[0]


def _inside(segment: Segment, flow: Flow, k: int, leaves: tuple[int, ...], kept: Kept) -> jax.Array:
    """What the segment's own steps add, (batch, rows, columns)."""
    plan, sizes, back = segment.plan, flow.sizes, flow.through(k, kept)
    view, part = plan.nodes[k].params, segment.nodes[k]
    if not isinstance(back, Back) or not isinstance(part, NodeSegment):
        return jnp.zeros((sizes["b"], sizes["r"], sum(view.sizes[i] for i in leaves)), plan.dtype)
    found = part.parameters(back, "rb", sizes)
    return jnp.concatenate([rows_of(found[i], view.sizes[i], sizes, plan.dtype) for i in leaves], axis=-1)


def _by_example(plan: Plan, w: int, k: int, start: jax.Array, traces: Traces) -> jax.Array:
    """``M S^{w,k}`` where w or k has depth, from what a gradient takes from the traces, λ · S summed over examples:
    with the rows of M one by one for λ, and batches of one.

    Args:
      start: (rows, batch, n_w), behind an axis of layers where w has depth.

    Returns:
      (layers of k, batch, rows, columns).
    """
    names = {plan.name(w, k), plan.low_rank_name(k) if w == k else plan.name(w, k)}
    held = {name: traces[name] for name in names if name in traces}
    example = 0 if plan.graph.nodes[w].depth is None else 1  # the axis of a trace that is the batch's

    def row(start: jax.Array, held: Traces) -> jax.Array:
        start, held = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, example), (start, held))
        if w == k:
            return own_gradient_of_layers(plan, k, start, held)
        return cross_gradient(plan, w, k, start, held)

    rows = jax.vmap(row, (example, None), 1)
    return jax.vmap(rows, (example + 1, example), 1)(start, held)
