"""Plans of a network, each made once per shapes and kept; which of its parameters are trained."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import jax
import numpy as np

from deepeprop_jax.analysis.network import AnalysedNetwork, analyse_network
from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.mesh_axes import varying_axes
from deepeprop_jax.jaxpr.real_leaves import shape_and_dtype
from deepeprop_jax.jaxpr.trace import context
from deepeprop_jax.learner.signals import indices_of
from deepeprop_jax.network.arguments import batch_size, check_nesting, warn_of_integers
from deepeprop_jax.network.cell import Graph, PyTree, select, with_constants
from deepeprop_jax.traces.make_plan import make_plan
from deepeprop_jax.traces.plan import Mode, Plan

Made = TypeVar("Made")
Trained = tuple[tuple[int, ...], ...]
"""Per node, the indices of its trained real parameter leaves."""


class Planner:
    """Analyses a network once per shapes of its params, carry and input, and per context (see ``program.context``).

    Args:
      graph: the network; in the attribute ``graph`` outputs whose signal is given are constants.
      mode: which influences are kept.
      trainable: as given to ``deep_eprop``.
    """

    def __init__(self, graph: Graph, mode: Mode, trainable: PyTree | None = None):
        self.graph = with_constants(graph, indices_of(graph, mode.signals))
        self._trainable, self._mode = trainable, mode
        self._nodes: dict[Hashable, Node] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._made: dict[Hashable, object] = {}

    def plan(self, params: PyTree, carry: PyTree, x: PyTree) -> Plan:
        """The plan for arrays, or shapes, of a batch."""
        key = _key(params, carry, x)
        if key not in self._plans:
            network, trained = analysed(self.graph, self._trainable, params, carry, x, self._nodes)
            self._plans[key] = make_plan(network, trained, self._mode)
        return self._plans[key]

    def once(self, make: Callable[..., Made], params: PyTree, carry: PyTree, x: PyTree) -> Made:
        """``make(plan, params, carry, x)`` of their shapes, kept as the plan is."""
        key = make, _key(params, carry, x)
        if key not in self._made:
            self._made[key] = make(self.plan(params, carry, x), *map(_avals, (params, carry, x)))
        return cast(Made, self._made[key])


def analysed(
    graph: Graph, trainable: PyTree | None, params: PyTree, carry: PyTree, x: PyTree, known: dict[Hashable, Node]
) -> tuple[AnalysedNetwork, Trained]:
    """What all modes share, for arrays, or shapes, of a batch; nodes already ``known`` are not analysed again."""
    check_nesting(graph, params, "params")
    check_nesting(graph, carry, "carry")
    batch_size(carry, x)
    params = _avals(params)
    network = analyse_network(graph, params, _avals(carry, 1), _avals(x, 1), known)
    return network, _trained_leaves(network, params, trainable)


def _trained_leaves(network: AnalysedNetwork, params: PyTree, trainable: PyTree | None) -> Trained:
    """See ``Trained``; ``trainable`` is None, or booleans shaped as params or a prefix of it, or a function to them."""
    mask = True if trainable is None else trainable(params) if callable(trainable) else trainable
    try:
        full = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, params)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"trainable must be booleans in the structure of params, or of a prefix of it; seen "
            f"{jax.tree.structure(mask)} for params {jax.tree.structure(params)}."
        ) from error
    trained = []
    for vertex, node in zip(network.graph.nodes, network.nodes, strict=True):
        flags = jax.tree.leaves(select(full, vertex.path))
        wrong = [flag for flag in flags if not isinstance(flag, bool | np.bool_)]
        if wrong:
            raise ValueError(f"trainable must hold booleans; seen {wrong[0]!r} at node '{vertex.name}'.")
        warn_of_integers(vertex.name, select(params, vertex.path), flags)
        real = [flag for flag, kind in zip(flags, node.params.kinds, strict=True) for _ in range(kind.value)]
        trained.append(tuple(i for i, flag in enumerate(real) if flag))
    return tuple(trained)


def _avals(tree: PyTree, without_axes: int = 0) -> PyTree:
    return jax.tree.map(lambda leaf: shape_and_dtype(leaf, without_axes), tree)


def _key(*trees: PyTree) -> Hashable:
    leaves, structure = jax.tree.flatten(trees)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), varying_axes(leaves), context()
