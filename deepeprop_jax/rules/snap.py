"""SnAp-n: real-time recurrent learning that keeps what a parameter reaches within n steps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Reach
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.learner.checks import check_count
from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.network.cell import parents
from deepeprop_jax.rules.by_steps import by_steps
from deepeprop_jax.rules.node_steps import Layer, Taken, layers_of, places, size_of, with_past
from deepeprop_jax.traces.plan import Plan


def snap(network: object, order: int, *, connected: np.ndarray | None = None) -> OnlineLearner:
    """SnAp-n, the sparse n-step approximation of real-time recurrent learning: S with a fixed pattern K of entries.

        S_t  =  K ∘ (∂F/∂h · S_{t-1}  +  ∂F/∂θ)          for one recurrent layer

    K of order 1 has, for every parameter of a layer, the units of that layer that it writes to in one step: for a
    weight the one unit that it leads to. Every further order adds what is reached from there in one step more, by the
    pattern of ∂h_t/∂h_{t-1}, from unit to unit and, within the step, up into the layers above. What a layer has kept of
    the past goes up through the layers above it within the step, whether they keep it or not (``node_steps.py``, where
    ``past`` is K ∘ (∂F/∂h · S)).

    *Exact when* the order is so large that K grows no more. Order 1 is ``deep_eprop(network, hops=0)``, where every
    parameter writes to one unit; of one that writes to several, such as a convolution's kernel, it keeps them all, and
    what passes between them. Order 2 is exact for a stack of dense layers, as in the paper; orders between differ where
    the units are connected sparsely.

    *Cost* per step and example: that of real-time recurrent learning, n |θ| numbers and n² |θ| products. What is not
    kept is stored as zeros: this file is there to see what the rule learns, not how fast it is.

    Args:
      network: as ``deep_eprop`` takes it.
      order: n, at least 1.
      connected: (n, n) bool, for sparse networks: whether number i of the carry may depend, after one step, on number
        j. Numbers run over the layers from below, in each over the carry's leaves in pytree order, without those that
        the library finds to be functions of others. A connection that is left out is one that is cut. None: all units
        of a layer whose units are coupled, and all of the layers above.

    Returns:
      An ``OnlineLearner``. Its ``value_and_grad`` goes step by step.

    Raises:
      TypeError, ValueError: an order that is no integer, or below 1; in ``init``, ``connected`` of another shape.

    Reference: J. Menick et al., "A Practical Sparse Approximation for Real Time Recurrent Learning"
    (arXiv:2006.07232).

    >>> import flax.linen as nn
    >>> learner = snap(nn.GRUCell(features=4), 1)
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2))
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(6))
    """
    check_count("order", order, 1, "an integer >= 1, the steps within which a parameter's reach is kept")
    rule = with_past(_past, partial(_kept, order=order, connected=connected))
    return by_steps(network, lambda cell: rule, snap, order=order, connected=connected)


def _past(kept: np.ndarray, taken: Taken, S_tm1: jax.Array) -> jax.Array:
    return jnp.where(kept, taken.F_h @ S_tm1, 0)


def _kept(plan: Plan, params: RealView, *, order: int, connected: np.ndarray | None) -> np.ndarray:
    """K: (n, |θ|) bool."""
    above, coupled = _above(plan), _coupled(plan) if connected is None else np.asarray(connected, bool)
    n = size_of(layers_of(plan))
    if coupled.shape != (n, n):
        raise ValueError(f"connected must have shape {(n, n)}, of all numbers in the carry; seen {coupled.shape}.")
    K, within_step = np.zeros((n, params.size), bool), np.zeros((n, params.size), bool)
    for k, layer in enumerate(layers_of(plan)):
        for leaf, entries in enumerate(places(plan, layer, params)):
            K[layer.own, entries.ravel()] = _written(layer, leaf, entries.shape)
            for v, higher in enumerate(layers_of(plan)):
                if above[v, k]:
                    within_step[higher.own, entries.ravel()] = True
    for _ in range(order - 1):
        # Of a parameter of a layer without a carry, the layers above are reached first.
        K = K | within_step | (coupled.astype(np.float32) @ K.astype(np.float32) > 0)
    return K


def _written(layer: Layer, leaf: int, shape: tuple[int, ...]) -> np.ndarray:
    """(n of the layer, entries): which numbers of its carry each entry of a parameter writes to in one step."""
    found = layer.node.leaves[leaf]
    if found.reach is not Reach.LOCAL or found.unit is None:
        return np.full((layer.node.carry.size, int(np.prod(shape, dtype=int))), found.reach is Reach.DENSE)
    unit = np.broadcast_to(found.unit, shape).ravel()
    return layer.node.units.unit[:, None] == unit[None]


def _above(plan: Plan) -> np.ndarray:
    """[v, k]: whether layer v lies above layer k: what k gives out reaches v within the step."""
    layers = layers_of(plan)
    last = {layer.vertex: i for i, layer in enumerate(layers)}
    above = np.zeros((len(layers), len(layers)), bool)
    for v, layer in enumerate(layers):
        wire = plan.graph.nodes[layer.vertex].wire
        for parent in [v - 1] if layer.level else [last[p] for p in parents(wire)]:
            above[v] |= above[parent]
            above[v, parent] = True
    return above


def _coupled(plan: Plan) -> np.ndarray:
    """(n, n) bool: which numbers of the carry depend on which after one step, as far as the analysis tells."""
    layers, above = layers_of(plan), _above(plan)
    coupled = np.zeros((size_of(layers),) * 2, bool)
    for v, layer in enumerate(layers):
        unit = layer.node.units.unit
        coupled[layer.own, layer.own] = (unit[:, None] == unit[None]) if layer.node.elementwise else True
        for k, lower in enumerate(layers):
            if above[v, k]:
                coupled[layer.own, lower.own] = True
    return coupled
