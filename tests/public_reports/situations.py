"""Situations from public reports, side by side in one network: each a cell as its pair (F, g), judged in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax import Cell, deep_eprop, graph
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.reference import Pair, bptt, stop_gradient_oracle
from tests.gradients import FLOAT64, assert_same_gradient, relative_errors

STEPS, BATCH, INPUTS, UNITS = 7, 2, 2, 3
LENGTHS = (1, 3)
"""Segments of one step, and three segments of which the last one is shorter."""


class Situation(NamedTuple):
    """A cell with the numbers that it is run on.

    Attributes:
      pair: F and g.
      params: float64.
      carry: with a leading batch axis.
    """

    pair: Pair
    params: PyTree
    carry: PyTree


def numbers(seed: int, *shape: int, scale: float = 0.6) -> jax.Array:
    """Normal numbers in float64, without a compilation."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def kernels(seed: int, units: int = UNITS, **more: Any) -> dict[str, jax.Array]:
    """Input weights W, lateral weights U and a bias b of one layer, and ``more``."""
    return {
        "W": numbers(seed, INPUTS, units),
        "U": numbers(seed + 1, units, units),
        "b": numbers(seed + 2, units),
    } | more


def output_of(leaf: int | str | None = None):
    """g of a cell whose output is one leaf of its carry, or all of it."""
    return lambda params, carry_t, carry_tm1, x: carry_t if leaf is None else carry_t[leaf]


def side_by_side(situations: Mapping[str, Situation]) -> tuple[Cell, list[Pair], PyTree, PyTree]:
    """One network of nodes that all see the input, so that one program holds them all.

    Returns:
      Network, pairs, params and carry.
    """
    cells = {name: (Cell(None, situation.pair.apply), "input") for name, situation in situations.items()}
    network = graph(cells, outputs=tuple(cells))
    params = {name: situation.params for name, situation in situations.items()}
    carry = {name: situation.carry for name, situation in situations.items()}
    return network, [situations[node.name].pair for node in network.graph.nodes], params, carry


def loss_fn(y: PyTree, target: jax.Array) -> jax.Array:
    """Weighted by step and by unit, so that no two units are alike."""
    leaves = [leaf.reshape(BATCH, -1) for leaf in jax.tree.leaves(y)]
    return target * sum(
        jnp.sum((leaf - 0.3) ** 2 @ jnp.arange(1, 1 + leaf.shape[1], dtype=leaf.dtype)) for leaf in leaves
    )


TARGETS = numbers(0, STEPS, scale=1.0)


def judge(
    network: Cell,
    pairs: Sequence[Pair] | None,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    resets: Sequence[jax.Array | None] = (None,),
    lengths: Sequence[int] = LENGTHS,
    must_differ: bool = False,
    without_gradient: Sequence[str] = (),
) -> None:
    """Exact mode against BPTT and, where the network is written as pairs, deep e-prop against its oracle; one program.

    Args:
      resets: the runs to judge, each with these; arrays share one program.
      must_differ: whether deep e-prop must be another gradient than BPTT's, or both would be judged by one number.
      without_gradient: the leaves of params whose gradient is zero.
    """
    needed: dict[str, Any] = {"exact": bptt(network, loss_fn)}
    if pairs is not None:
        needed["deep"] = stop_gradient_oracle(network, loss_fn, pairs)
    learners = {mode: deep_eprop(network, exact=mode == "exact") for mode in needed}

    @jax.jit
    def everything(params: PyTree, carry: PyTree, xs: PyTree, targets: jax.Array, resets: jax.Array | None) -> Any:
        seen = {}
        for mode, learner in learners.items():
            state = learner.init(params, carry, jax.tree.map(lambda leaf: leaf[0], xs))
            for length in lengths:
                run = learner.value_and_grad(loss_fn, segment_length=length)
                seen[mode, length] = run(params, state, xs, targets, resets)[1]
        return seen, {mode: oracle(params, carry, xs, targets, resets)[1] for mode, oracle in needed.items()}

    for run, flags in enumerate(resets):
        seen, gradients = everything(params, carry, xs, TARGETS, flags)
        for (mode, length), gradient in seen.items():
            assert_same_gradient(gradient, gradients[mode], FLOAT64, f"run {run}: {mode}, segments of {length}")
        nothing = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree.leaves_with_path(gradients["exact"])
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.any(leaf)
        ]
        assert nothing == list(without_gradient), f"without a gradient, so that nothing is judged: {nothing}"
        if must_differ:
            assert max(relative_errors(gradients["deep"], gradients["exact"]).values()) > 1e-3
