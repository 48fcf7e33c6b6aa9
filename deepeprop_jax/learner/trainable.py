"""``trainable``: which parameters have traces and a gradient."""

from __future__ import annotations

import jax
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.network.arguments import warn_of_integers
from deepeprop_jax.network.cell import Graph, PyTree, select


def trained_leaves(
    graph: Graph, nodes: tuple[Node, ...], params: PyTree, trainable: PyTree | None
) -> tuple[tuple[int, ...], ...]:
    """Per node, the indices of its trained real parameter leaves.

    Args:
      params: shapes and dtypes.
      trainable: None, booleans shaped as ``params`` or as a prefix of it, or a function of params' shapes giving them.

    Raises:
      ValueError: of another structure, or not of booleans.
    """
    flags = _flags(graph, params, trainable)
    pairs = zip(nodes, flags, strict=True)
    return tuple(tuple(i for i, leaf in enumerate(_leaf_of_real(node)) if own[leaf]) for node, own in pairs)


def _leaf_of_real(node: Node) -> list[int]:
    """For each real parameter leaf, the index of the params leaf that it is (part of)."""
    return [i for i, kind in enumerate(node.params.kinds) for _ in range(kind.value)]


def _flags(graph: Graph, params: PyTree, trainable: PyTree | None) -> tuple[tuple[bool, ...], ...]:
    if trainable is None:
        full = jax.tree.map(lambda _: True, params)
    else:
        mask = trainable(params) if callable(trainable) else trainable
        try:
            full = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, params)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"trainable must be booleans in the structure of params, or of a prefix of it; seen "
                f"{jax.tree.structure(mask)} for params {jax.tree.structure(params)}."
            ) from error
    result = []
    for vertex in graph.nodes:
        flags = jax.tree.leaves(select(full, vertex.path))
        wrong = [flag for flag in flags if not isinstance(flag, bool | np.bool_)]
        if wrong:
            raise ValueError(f"trainable must hold booleans; seen {wrong[0]!r} at node '{vertex.name}'.")
        warn_of_integers(vertex.name, select(params, vertex.path), flags)
        result.append(tuple(bool(flag) for flag in flags))
    return tuple(result)
