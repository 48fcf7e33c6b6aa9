"""The one table of cells and topologies, and random problems on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.cell import Cell, PyTree, assemble, graph_of, select
from deepeprop_jax.reference import Pair, is_differentiable
from tests.zoo_cells import ZooCell, stock
from tests.zoo_networks import ZooNetwork, alone, sandwich, topologies
from tests.zoo_odd import odd

__all__ = ["Problem", "ZooCell", "ZooNetwork", "cells", "find", "margin", "networks", "problem", "squared_error"]


@functools.cache
def cells() -> dict[str, ZooCell]:
    """Every cell of the zoo by name."""
    return {cell.name: cell for cell in (*stock(), *odd())}


@functools.cache
def networks() -> dict[str, ZooNetwork]:
    """Every network of several nodes by name."""
    return {network.name: network for network in topologies()}


def find(name: str) -> ZooNetwork:
    """A cell alone, a network, or ``"sandwich/<cell>"``: the cell between two recurrent layers."""
    kind, _, inner = name.partition("/")
    if kind == "sandwich":
        return sandwich(cells()[inner])
    return networks()[name] if name in networks() else alone(cells()[name])


class Problem(NamedTuple):
    """A network with everything that a gradient of it needs.

    Attributes:
      network: the network.
      pairs: F and g of each node, in the order of ``graph_of(network).nodes``.
      params: with random numbers where ``init`` gives zeros.
      carry: random, (batch, ...).
      xs: (T, batch, ...).
      targets: ``{"value": like ys, "weight": (T,)}``.
      loss_fn: ``squared_error``.
      loss_weights: (T,).
      zoo: the entry of the zoo.
    """

    network: Cell
    pairs: tuple[Pair, ...]
    params: PyTree
    carry: PyTree
    xs: jax.Array
    targets: PyTree
    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    loss_weights: jax.Array
    zoo: ZooNetwork


def squared_error(y: PyTree, target: PyTree) -> jax.Array:
    """weight_t × squared error, summed over all outputs and the batch."""
    errors = jax.tree.map(lambda seen, wanted: jnp.sum((seen - wanted) ** 2), y, target["value"])
    return target["weight"] * sum(jax.tree.leaves(errors))


def problem(
    name: str,
    dtype: Any = jnp.float64,
    *,
    steps: int = 12,
    batch: int = 3,
    seed: int = 0,
    loss: Literal["every", "last"] = "every",
) -> Problem:
    """A random problem on an entry of the zoo; the same numbers for every dtype, rounded.

    Args:
      name: as ``find`` takes it.
      dtype: of parameters, carry, inputs and targets (a complex leaf gets the complex dtype that belongs to it).
      steps: T.
      batch: number of examples.
      seed: of all random numbers.
      loss: random weights at every step, or a weight at the last step only.
    """
    zoo = find(name)
    network = zoo.make()
    keys = jax.random.split(jax.random.key(seed), 6)
    xs = jax.random.normal(keys[0], (steps, batch, *zoo.input_shape), jnp.float32)
    params, carry = network.init(keys[1], xs[0])
    params, carry, xs = _cast((_without_zeros(keys[2], params), _random_carry(keys[3], zoo, network, carry), xs), dtype)
    # A scan would need equal dtypes; the shapes alone are wanted.
    _, y = jax.eval_shape(jax.vmap(network.apply, in_axes=(None, 0, 0)), params, carry, xs[0])
    value = jax.tree.map(lambda leaf: 0.5 * jax.random.normal(keys[4], (steps, *leaf.shape), jnp.float32), y)
    weight = jax.random.uniform(keys[5], (steps,), jnp.float32, 0.5, 1.5) if loss == "every" else jnp.eye(steps)[-1]
    targets = _cast({"value": value, "weight": weight}, dtype)
    return Problem(network, zoo.pairs, params, carry, xs, targets, squared_error, targets["weight"], zoo)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    def cast(leaf: jax.Array) -> jax.Array:
        if not is_differentiable(leaf):
            return leaf
        return leaf.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(leaf) else dtype)

    return jax.tree.map(cast, tree)


def _without_zeros(key: jax.Array, params: PyTree) -> PyTree:
    """Random numbers in place of every leaf that starts as zeros, so that no gradient is zero by luck."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    filled = [
        leaf if jnp.any(leaf != 0) else 0.3 * jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
        for leaf, leaf_key in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, filled)


def _random_carry(key: jax.Array, zoo: ZooNetwork, network: Cell, carry: PyTree) -> PyTree:
    graph = graph_of(network)
    keys = jax.random.split(key, len(graph.nodes))
    values = [
        (_spiking_carry if cell.distance else _normal_carry)(node_key, select(carry, node.path))
        for node, cell, node_key in zip(graph.nodes, zoo.cells, keys, strict=True)
    ]
    return assemble(graph, values)


def _normal_carry(key: jax.Array, carry: PyTree) -> PyTree:
    """Normal numbers; counters start anywhere in 0, 1, 2; PRNG keys stay."""
    leaves, structure = jax.tree.flatten(carry)
    filled = []
    for leaf, leaf_key in zip(leaves, jax.random.split(key, max(len(leaves), 1)), strict=False):
        if is_differentiable(leaf):
            filled.append(0.5 * jax.random.normal(leaf_key, leaf.shape, leaf.dtype))
        elif jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            filled.append(leaf)
        else:
            filled.append(jax.random.randint(leaf_key, leaf.shape, 0, 3, leaf.dtype))
    return jax.tree.unflatten(structure, filled)


def _spiking_carry(key: jax.Array, carry: PyTree) -> PyTree:
    """Potentials around rest and threshold, non-negative adaptation, spikes 0 or 1, refractory where not spiking."""
    keys = jax.random.split(key, 4)
    v, *adaptation = [leaf for leaf in carry if is_differentiable(leaf)][:-1]
    z = jax.random.bernoulli(keys[1], 0.3, v.shape).astype(v.dtype)
    left = [jnp.where(z > 0, 2, jax.random.randint(keys[3], v.shape, 0, 2)).astype(jnp.int32)]
    filled = (
        jax.random.uniform(keys[0], v.shape, v.dtype, -1, 1.5),
        *(jax.random.uniform(keys[2], leaf.shape, leaf.dtype) for leaf in adaptation),
        z,
    )
    return (*filled, *left[: len(carry) - len(filled)])


def margin(problem: Problem) -> float:
    """The smallest distance of any membrane to its threshold over the run; infinite for a network without spikes.

    Where it is small, rounding alone can turn a spike on or off, and two correct programs may differ.
    """
    graph = graph_of(problem.network)

    def step(carry: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        carry, _ = jax.vmap(problem.network.apply, in_axes=(None, 0, 0))(problem.params, carry, x)
        nearest = jnp.asarray(jnp.inf, x.dtype)
        for node, cell in zip(graph.nodes, problem.zoo.cells, strict=True):
            if cell.distance:
                nearest = jnp.minimum(nearest, jnp.abs(cell.distance(select(carry, node.path))).min())
        return carry, nearest

    return float(jax.lax.scan(step, problem.carry, problem.xs)[1].min())
