"""A network of which one part of the parameters learns, the same on every device but for where the part lies.

    theta = rest + own at the part's place        own: zeros, d loss / d own is the gradient of that part

A leaf is cut into equal parts along its last axis, where that divides, else along the last one that does. A leaf with
no such axis is every part's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.network.cell import Cell, Graph, PyTree, assemble, graph_of, select


class PartOfParams(NamedTuple):
    """The params of a node, of which a part learns.

    Attributes:
      own: zeros, shaped as the part: per leaf of numbers in pytree order.
      rest: the node's params.
    """

    own: list[jax.Array]
    rest: PyTree


def axis_of(shape: tuple[int, ...], parts: int, layers: int) -> int | None:
    """The axis along which a leaf is cut; None where none divides.

    Args:
      layers: how many axes of layers it has in front, which are not cut.
    """
    return next(
        (axis for axis in reversed(range(layers, len(shape))) if shape[axis] and shape[axis] % parts == 0), None
    )


def is_number(leaf: jax.Array) -> bool:
    """Whether a leaf has a derivative."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _constant(leaf: jax.Array) -> jax.Array:
    return lax.stop_gradient(leaf) if is_number(leaf) else leaf


def layers_of(graph: Graph) -> list[int]:
    """Per node, how many axes of layers its params have in front."""
    return [0 if vertex.depth is None else 1 for vertex in graph.nodes]


def own_shape(shape: tuple[int, ...], parts: int, layers: int) -> tuple[int, ...]:
    """Of a part of a leaf."""
    axis = axis_of(shape, parts, layers)
    return shape if axis is None else (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])


def with_parts(graph: Graph, params: PyTree, parts: int) -> PyTree:
    """Params of ``learning_part`` from those of the network."""
    found = []
    for vertex, layers in zip(graph.nodes, layers_of(graph), strict=True):
        rest = jax.tree.map(jnp.asarray, select(params, vertex.path))
        numbers = [leaf for leaf in jax.tree.leaves(rest) if is_number(leaf)]
        own = [jnp.zeros(own_shape(leaf.shape, parts, layers), leaf.dtype) for leaf in numbers]
        found.append(PartOfParams(own, rest))
    return assemble(graph, found)


def learning_part(network: Cell, number: int, parts: int) -> Cell:
    """The network of params as ``with_parts`` gives them."""
    graph = graph_of(network)

    def joined(params: PartOfParams, layers: int) -> PyTree:
        # Without a derivative, so that no more than the part's is ever computed.
        leaves, structure = jax.tree.flatten(jax.tree.map(_constant, params.rest))
        own = iter(params.own)
        return structure.unflatten([_added(leaf, next(own), layers) if is_number(leaf) else leaf for leaf in leaves])

    def _added(whole: jax.Array, own: jax.Array, layers: int) -> jax.Array:
        axis = axis_of(whole.shape, parts, layers)
        if axis is not None:
            size = own.shape[axis]
            config = [(0, 0, 0)] * own.ndim
            config[axis] = (number * size, (parts - 1 - number) * size, 0)
            own = lax.pad(own, jnp.zeros((), own.dtype), config)
        return whole + own

    def of_node(apply: Callable) -> Callable:
        return lambda params, carry, x: apply(joined(params, 0), carry, x)

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        found = [joined(select(params, v.path), n) for v, n in zip(graph.nodes, layers_of(graph), strict=True)]
        return network.apply(assemble(graph, found), carry, x)

    nodes = tuple(v._replace(cell=Cell(v.cell.init, of_node(v.cell.apply))) for v in graph.nodes)
    return Cell(network.init, apply, graph._replace(nodes=nodes))
