"""Plans of a network, each made once per shapes and kept."""

from __future__ import annotations

from typing import Any

import jax

from deepeprop_jax.analysis.network import analyse_network
from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.mesh_axes import varying_axes
from deepeprop_jax.jaxpr.real_leaves import shape_and_dtype
from deepeprop_jax.jaxpr.trace import context
from deepeprop_jax.learner.stepper import Stepper, stepper_of
from deepeprop_jax.learner.trainable import trained_leaves
from deepeprop_jax.network.arguments import batch_size, check_nesting
from deepeprop_jax.network.cell import Graph, PyTree
from deepeprop_jax.traces.make_plan import make_plan
from deepeprop_jax.traces.plan import Plan


class Planner:
    """Analyses a network once per shapes of its params, carry and input, and per context (see ``program.context``).

    Args:
      graph: the network.
      exact, hops, trainable, rank: as given to ``deep_eprop``.
      like: a planner of the same network in another mode, whose analyses of nodes are used and added to.
    """

    def __init__(
        self,
        graph: Graph,
        exact: bool,
        hops: int | None,
        trainable: Any,
        rank: int | None = None,
        like: Planner | None = None,
    ):
        self.graph, self.exact, self.hops, self.trainable, self.rank = graph, exact, hops, trainable, rank
        self._nodes: dict[Any, Node] = {} if like is None else like._nodes
        self._plans: dict[Any, Plan] = {}
        self._updates: dict[Any, PyTree] = {}

    def plan(self, params: PyTree, carry: PyTree, x: PyTree) -> Plan:
        """The plan for arrays, or shapes, of a batch."""
        check_nesting(self.graph, params, "params")
        check_nesting(self.graph, carry, "carry")
        batch_size(carry, x)
        key = _key(params, carry, x)
        if key not in self._plans:
            shapes = (_avals(params), _avals(carry, without_batch=True), _avals(x, without_batch=True))
            network = analyse_network(self.graph, *shapes, self._nodes)
            trained = trained_leaves(self.graph, network.nodes, shapes[0], self.trainable)
            self._plans[key] = make_plan(network, trained, self.exact, self.hops, self.rank)
        return self._plans[key]

    def stepper(self, params: PyTree, carry: PyTree, x: PyTree) -> Stepper:
        """How a single step moves the traces."""
        return stepper_of(self.plan(params, carry, x))

    def pending_update(self, params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
        """Shapes and dtypes of ``Pending.update``."""
        key = _key(params, carry, x), batch_size(carry, x)
        if key not in self._updates:
            stepper = self.stepper(params, carry, x)

            def update(params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
                return stepper.update_of(stepper.run(params, carry, x).step, params)

            self._updates[key] = jax.eval_shape(update, _avals(params), _avals(carry), _avals(x))
        return self._updates[key]


def _avals(tree: PyTree, without_batch: bool = False) -> PyTree:
    return jax.tree.map(lambda leaf: shape_and_dtype(leaf, int(without_batch)), tree)


def _key(*trees: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(trees)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), varying_axes(leaves), context()
