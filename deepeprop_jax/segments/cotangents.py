"""Cotangents of a pytree's real leaves inside a segment, as arrays, and unit vectors as such cotangents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.jaxpr.real_leaves import RealView


def vector(view: RealView, dtype: jnp.dtype, ct: Leaves, axes: str, sizes: dict[str, int]) -> jax.Array:
    """All leaves as one array (*axes, size)."""
    lead = tuple(sizes[axis] for axis in axes)
    parts = [jnp.zeros((*lead, 0), dtype)] if not view.sizes else []
    for leaf, size in zip(ct, view.sizes, strict=True):
        flat = jnp.zeros((*lead, size), dtype) if leaf is None else broadcast(leaf.flat(), axes, sizes)
        parts.append(flat.astype(dtype))
    return jnp.concatenate(parts, axis=-1)


def rows_of(x: Lifted | None, size: int, sizes: dict[str, int], dtype: jnp.dtype) -> jax.Array:
    """One leaf as (batch, rows, size)."""
    if x is None:
        return jnp.zeros((sizes["b"], sizes["r"], size), dtype)
    return jnp.swapaxes(broadcast(x.flat(), "rb", sizes), 0, 1).astype(dtype)


def unit_vectors(view: RealView) -> Leaves:
    """Every unit vector, one per row."""
    parts = view.unflatten(jnp.eye(view.size))
    return [Lifted(part.astype(dtype), "r") for part, dtype in zip(parts, view.dtypes, strict=True)]
