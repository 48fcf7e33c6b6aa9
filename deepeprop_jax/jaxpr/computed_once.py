"""What XLA on a CPU would compute anew for every entry that reads it, computed once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import PyTree


def computed_once(tree: PyTree) -> PyTree:
    """The same arrays, stored: XLA computes a cheap expression anew in all that reads it, here for every entry of the
    weights, but not what comes out of a loop."""

    def body(part: jax.Array, stored: PyTree) -> PyTree:
        def store(x: jax.Array, stored: jax.Array) -> jax.Array:
            size = x.shape[-1] // fewest_parts(x.shape[-1])
            start = part * size % x.shape[-1]
            piece = lax.dynamic_slice_in_dim(x, start, size, axis=-1, allow_negative_indices=False)
            return lax.dynamic_update_slice_in_dim(stored, piece, start, axis=-1, allow_negative_indices=False)

        return jax.tree.map(store, tree, stored)

    turns = max((fewest_parts(x.shape[-1]) for x in jax.tree.leaves(tree)), default=0)
    return lax.fori_loop(0, turns, body, vary_like(jax.tree.map(jnp.zeros_like, tree), tree))


def fewest_parts(size: int) -> int:
    """The smallest number of equal parts that is more than one; a loop of one turn XLA would dissolve."""
    return next((count for count in range(2, size + 1) if size % count == 0), 1)
