"""A node's own local traces as the segment engine holds them: one array (batch, *leaf) per slot of a unit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.lattice import Traces
from deepeprop_jax.plan import Plan
from deepeprop_jax.trace import Block, spread


def split_slots(plan: Plan, traces: Traces) -> Traces:
    """Own local traces as one array (batch, *leaf) per slot.

    XLA on a CPU would copy an array (batch, K, |leaf|) at every segment, and divide for every entry of (batch, |leaf|)
    to find its unit.
    """
    split = dict(traces)
    for v, blocks in enumerate(plan.own):
        if plan.name(v, v) in traces:
            pairs = zip(blocks, traces[plan.name(v, v)], strict=True)
            split[plan.name(v, v)] = tuple(_split(plan, v, b, t) if b.kind == "local" else t for b, t in pairs)
    return split


def _split(plan: Plan, v: int, block: Block, trace: jax.Array) -> list[jax.Array]:
    (leaf,) = block.leaves
    return [trace[:, k].reshape(-1, *plan.nodes[v].params.shapes[leaf]) for k in range(block.rows)]


def stack_slots(rows: list[jax.Array]) -> jax.Array:
    """(batch, K, |leaf|)."""
    return jnp.stack([row.reshape(row.shape[0], -1) for row in rows], axis=1)


def join_slots(plan: Plan, traces: Traces) -> Traces:
    """The inverse of ``split_slots``."""
    joined = dict(traces)
    for v, blocks in enumerate(plan.own):
        if plan.name(v, v) in traces:
            pairs = zip(blocks, traces[plan.name(v, v)], strict=True)
            joined[plan.name(v, v)] = tuple(stack_slots(t) if b.kind == "local" else t for b, t in pairs)
    return joined


def without_examples(where: jax.Array, traces: Traces) -> Traces:
    """Traces, as ``split_slots`` gives them, that are zero for some examples: (batch,)."""
    return jax.tree.map(lambda t: jnp.where(where.reshape(-1, *(1,) * (t.ndim - 1)), 0, t), traces)


WRITTEN_OUT = 32
"""Up to this many examples a sum over them is written out."""


def over_leaf(values: jax.Array, block: Block, shape: tuple[int, ...]) -> jax.Array:
    """(batch, K, units) given to the entries of a leaf, (batch, K, *leaf); size 1 along axes that do not matter."""
    lead = values.shape[:-1]
    if block.unit is not None and block.unit.size:
        unit = block.unit.reshape(shape)
        for axis in range(len(shape)):
            line = unit[tuple(slice(None) if i == axis else slice(0, 1) for i in range(len(shape)))]
            first, count = int(line.flat[0]), shape[axis]
            if np.array_equal(unit, np.broadcast_to(line, shape)) and np.array_equal(
                line.ravel(), np.arange(first, first + count)
            ):
                used = jax.lax.slice_in_dim(values, first, first + count, axis=values.ndim - 1)
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
