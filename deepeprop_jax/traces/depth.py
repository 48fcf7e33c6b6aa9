"""``stack(cell, depth=L)``: the layer functions under one ``lax.scan`` over depth, so L does not enter the program.

The influences of all source layers stand one behind the other. Layer l keeps a trace of the min(l, ``band``) source
layers below it. All kept pairs (l, k) lie one after the other, by l and then by k.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.mesh_axes import vary_like


class DeepTraces(NamedTuple):
    """The traces of a node with depth, for its own parameters.

    Attributes:
      own: per block, (L, batch, rows, columns): each layer's influence of its own parameters.
      band: (pairs, batch, n, columns): of the ``band`` layers below, see ``kept_pairs``; None if none is kept.
    """

    own: tuple[jax.Array, ...]
    band: jax.Array | None


class KeptPairs(NamedTuple):
    """The pairs of layers whose influence is kept, those of a layer one after the other.

    Attributes:
      target, source: (pairs,) the layer that is influenced, and whose parameters influence it.
      start: (L,) per layer, where its pairs start.
    """

    target: np.ndarray
    source: np.ndarray
    start: np.ndarray


def kept_pairs(depth: int, band: int) -> KeptPairs:
    """Every layer with each of the at most ``band`` layers below it."""
    count = np.minimum(np.arange(depth), band)
    start = np.cumsum(count) - count
    target = np.repeat(np.arange(depth), count)
    return KeptPairs(target, np.arange(target.size) - start[target] + target - count[target], start)


class PlaceInBand(NamedTuple):
    """Where a pair of layers lies among those kept; anywhere if it is not."""

    kept: jax.Array
    index: jax.Array


def place_of(depth: int, band: int, target: jax.Array, source: jax.Array) -> PlaceInBand:
    """Of one pair of layers."""
    pairs, first = kept_pairs(depth, band), jnp.maximum(target - band, 0)
    index = jnp.asarray(pairs.start)[target] + source - first
    return PlaceInBand((source >= first) & (source < target), jnp.clip(index, 0, pairs.target.size - 1))


def put_pairs(held: jax.Array, found: jax.Array, target: jax.Array, band: int) -> jax.Array:
    """(pairs, ...) with what ``target`` owes to every layer, (L, ...), in the place of its own."""

    def body(held: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        source, new = now
        place = place_of(found.shape[0], band, target, source)
        old = layer_of(held, place.index)
        return with_layer(held, jnp.where(place.kept, new, old), place.index), None

    return jax.lax.scan(body, held, (jnp.arange(found.shape[0]), found))[0]


def layer_of(array: jax.Array, index: jax.Array) -> jax.Array:
    """One entry of the first axis."""
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def with_layer(array: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """With another entry there."""
    return jax.lax.dynamic_update_index_in_dim(array, new, index, 0)


def columns_of(node: Node, wanted: tuple[int, ...], columns: jax.Array, held: tuple[int, ...]) -> jax.Array:
    """The columns of the leaves ``wanted`` among those of ``held``: (..., columns)."""
    if wanted == held:
        return columns
    ends = np.cumsum([node.params.sizes[i] for i in held])[:-1]
    parts = dict(zip(held, jnp.split(columns, ends, axis=-1), strict=True))
    return jnp.concatenate([parts[i] for i in wanted], axis=-1)


def band_gradient(cotangent: jax.Array, held: jax.Array, band: int) -> jax.Array:
    """``lambda . S`` of the kept influences between layers, as a gradient per source layer, (L, columns).

    Args:
      cotangent: (L, batch, n).
      held: (pairs, batch, n, columns).
    """
    pairs = kept_pairs(cotangent.shape[0], band)
    found = jnp.einsum("jbn,jbnp->jp", cotangent[pairs.target], held)
    return jnp.zeros((cotangent.shape[0], held.shape[-1]), held.dtype).at[pairs.source].add(found)


def push_pairs(start: jax.Array, held: jax.Array, band: int, total: jax.Array, top: jax.Array) -> jax.Array:
    """Add ``M S`` of the kept influences between layers to what rows owe to every source layer.

    Args:
      start: M, (L, rows, batch, n), what the rows owe to every layer's carry; zero above ``top``.
      held: S, (pairs, batch, n, columns).
      total: (L, batch, rows, columns).
      top: the highest layer that the rows owe anything to.

    Cost: one product of matrices for every pair up to ``top``.
    """
    pairs, total = kept_pairs(start.shape[0], band), vary_like(total, start, held)

    def body(total: jax.Array, pair: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        target, source, matrix = pair

        def times(matrix: jax.Array) -> jax.Array:
            return jnp.einsum("rbn,bnp->brp", start[target], matrix)

        def nothing(matrix: jax.Array) -> jax.Array:
            return jnp.zeros_like(total[0])

        product = jax.lax.cond(target <= top, times, nothing, matrix)
        return with_layer(total, layer_of(total, source) + product, source), None

    return jax.lax.scan(body, total, (jnp.asarray(pairs.target), jnp.asarray(pairs.source), held))[0]
