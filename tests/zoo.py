"""The one table of cells and topologies, and random problems on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax import LearnerState, OnlineLearner
from deepeprop_jax.network.cell import Cell, PyTree, assemble, graph_of, select
from deepeprop_jax.reference import Pair, is_differentiable
from tests.zoo_cells import ZooCell, stock
from tests.zoo_networks import ZooNetwork, alone, sandwich, topologies
from tests.zoo_odd import odd

__all__ = [
    "Problem",
    "ZooCell",
    "ZooNetwork",
    "cells",
    "find",
    "margin",
    "networks",
    "problem",
    "squared_error",
    "start",
]


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
    zoo, network, params, carry, xs, value, weight = _numbers(name, steps, batch, seed)
    if loss == "last":
        weight = np.eye(steps)[-1]
    params, carry, xs, targets = _cast((params, carry, xs, {"value": value, "weight": weight}), dtype)
    return Problem(network, zoo.pairs, params, carry, xs, targets, squared_error, targets["weight"], zoo)


@functools.cache
def _numbers(name: str, steps: int, batch: int, seed: int):
    """All random numbers of a problem, in float64, but for what ``init`` draws. NumPy's: no compilation."""
    zoo = find(name)
    network = zoo.make()
    draw = np.random.default_rng([seed, *name.encode()])
    xs = draw.normal(size=(steps, batch, *zoo.input_shape))
    # Not jitted: one small program for each primitive and shape serves all networks.
    params, carry = network.init(jax.random.key(seed), xs[0].astype(np.float32))
    params, carry = _without_zeros(draw, params), _random_carry(draw, zoo, network, carry)
    _, y = jax.eval_shape(jax.vmap(network.apply, in_axes=(None, 0, 0)), *_cast((params, carry, xs[0]), np.float32))
    value = jax.tree.map(lambda leaf: 0.5 * draw.normal(size=(steps, *leaf.shape)), y)
    return zoo, network, params, carry, xs, value, draw.uniform(0.5, 1.5, size=steps)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    def cast(leaf: Any) -> jax.Array:
        if not is_differentiable(leaf):
            return jnp.asarray(leaf)
        kind = np.result_type(dtype, np.complex64) if np.iscomplexobj(leaf) else dtype
        return jnp.asarray(np.asarray(leaf).astype(kind))

    return jax.tree.map(cast, tree)


def _without_zeros(draw: np.random.Generator, params: PyTree) -> PyTree:
    """Random numbers in place of every leaf that starts as zeros, so that no gradient is zero by luck."""

    def fill(leaf: jax.Array) -> Any:
        if not is_differentiable(leaf) or np.any(np.asarray(leaf) != 0):
            return leaf
        return 0.3 * _normal(draw, leaf)

    return jax.tree.map(fill, params)


def _normal(draw: np.random.Generator, leaf: jax.Array) -> np.ndarray:
    numbers = draw.normal(size=leaf.shape)
    return numbers + 1j * draw.normal(size=leaf.shape) if jnp.iscomplexobj(leaf) else numbers


def _random_carry(draw: np.random.Generator, zoo: ZooNetwork, network: Cell, carry: PyTree) -> PyTree:
    graph = graph_of(network)
    values = [
        (_spiking_carry if cell.distance else _normal_carry)(draw, select(carry, node.path))
        for node, cell in zip(graph.nodes, zoo.cells, strict=True)
    ]
    return assemble(graph, values)


def _normal_carry(draw: np.random.Generator, carry: PyTree) -> PyTree:
    """Normal numbers; counters start anywhere in 0, 1, 2; PRNG keys stay."""

    def fill(leaf: jax.Array) -> Any:
        if is_differentiable(leaf):
            return 0.5 * _normal(draw, leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return draw.integers(0, 3, size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, carry)


def _spiking_carry(draw: np.random.Generator, carry: PyTree) -> PyTree:
    """Potentials around rest and threshold, non-negative adaptation, spikes 0 or 1, refractory where not spiking."""
    v, *adaptation = [leaf for leaf in carry if is_differentiable(leaf)][:-1]
    z = (draw.random(v.shape) < 0.3).astype(np.float64)
    left = [np.where(z > 0, 3, draw.integers(0, 2, size=v.shape)).astype(np.int32)]
    filled = (draw.uniform(-1, 1.5, size=v.shape), *(draw.random(leaf.shape) for leaf in adaptation), z)
    return (*filled, *left[: len(carry) - len(filled)])


def start(learner: OnlineLearner, p: Problem) -> LearnerState:
    """The learner's state, by one program: ``init`` alone would compile one for every shape."""
    return jax.jit(learner.init)(p.params, p.carry, jax.tree.map(lambda leaf: leaf[0], p.xs))


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
