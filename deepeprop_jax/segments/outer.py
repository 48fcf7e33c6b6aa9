"""Of weights whose immediate influence is an outer product, delta (x) z, both factors at every step of a segment."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.traces.low_rank import Layout


def deltas(layout: Layout, values: Leaves, sizes: dict[str, int], dtype: jnp.dtype) -> jax.Array:
    """(batch, C, N), or (batch, C, R N) where ``sizes`` has rows r, from what ``VjpProgram.to_params`` gave."""
    axes = "crb" if "r" in sizes else "cb"
    rows = _joined([values[i] for i in layout.deltas], layout.row_widths, axes, sizes, dtype)
    rows = jnp.moveaxis(rows, -2, 0)
    return rows.reshape(*rows.shape[:2], -1)


def factors(layout: Layout, values: Sequence[Lifted], sizes: dict[str, int], dtype: jnp.dtype) -> jax.Array:
    """(batch, C, M), from the values of ``layout.factors``."""
    found = _joined(values, layout.column_widths, "cb", sizes, dtype)
    return jnp.swapaxes(found, 0, 1)


def _joined(
    values: Sequence[Lifted | None], widths: Sequence[int], axes: str, sizes: dict[str, int], dtype: jnp.dtype
) -> jax.Array:
    """(*axes, all widths)."""
    zeros = [Lifted(jnp.zeros(width)) for width in widths]
    full = [broadcast(zero if x is None else x, axes, sizes) for x, zero in zip(values, zeros, strict=True)]
    return jnp.concatenate([x.astype(dtype) for x in full], axis=-1)
