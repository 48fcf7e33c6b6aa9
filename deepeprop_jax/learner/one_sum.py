"""A sum over devices as one collective, whatever the number and the dtypes of its arrays."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.network.cell import PyTree


def summed(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """The sum over the devices along ``axes`` of a mesh, inside ``shard_map``, in one all-reduce.

    XLA joins sums of one dtype by itself, on some platforms; packed into one vector they are one everywhere. The vector
    has the widest of the dtypes, so that bfloat16 beside float32 is summed in float32.

    Args:
      tree: real or complex numbers; what has another dtype (integers, ``float0``) is the same on all devices, and is
        left as it is.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size]
    if not places:
        return tree
    parts = [_as_real(leaves[i]) for i in places]
    dtype = _widest([part.dtype for part in parts])
    total = jax.lax.psum(jnp.concatenate([part.astype(dtype) for part in parts]), axes)
    start = 0
    for i, part in zip(places, parts, strict=True):
        piece = jax.lax.slice_in_dim(total, start, start + part.size).astype(part.dtype)
        leaves[i], start = _back(piece, leaves[i]), start + part.size
    return structure.unflatten(leaves)


def _as_real(leaf: jax.Array) -> jax.Array:
    flat = leaf.ravel()
    return jnp.concatenate([flat.real, flat.imag]) if jnp.iscomplexobj(leaf) else flat


def _back(piece: jax.Array, leaf: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(leaf):
        size = math.prod(leaf.shape)
        piece = jax.lax.complex(piece[:size], piece[size:])
    return piece.reshape(leaf.shape)


def _widest(dtypes: list[np.dtype]) -> np.dtype:
    """The widest; float32 for two that are as wide and hold different numbers (float16, bfloat16)."""
    widest = max(dtype.itemsize for dtype in dtypes)
    found = {np.dtype(dtype) for dtype in dtypes if dtype.itemsize == widest}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)
