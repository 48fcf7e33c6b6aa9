"""RFLO: random-feedback local online learning, with symmetric feedback."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node, Recurrence
from deepeprop_jax.jaxpr.batched import bind, evaluate
from deepeprop_jax.jaxpr.program import Equation, Program, dependents, variables
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.rules.by_steps import by_steps
from deepeprop_jax.rules.flat import vector
from deepeprop_jax.rules.node_steps import Taken, Visit, layers_of, places, size_of, with_past
from deepeprop_jax.traces.plan import Plan


def rflo(network: object) -> OnlineLearner:
    """RFLO: a parameter's trace decays by the leak of its own unit, and lateral weights carry no credit in time.

        h_t  =  (1 − a) ∘ h_{t-1}  +  a ∘ φ(x_t W_in + h_{t-1} W_rec)          a leaky network
        S_t  =  (1 − a) ∘ S_{t-1}  +  ∂F/∂θ

    For any cell: S_t = L S_{t-1} + ∂F/∂θ, where L is ∂F/∂h with the carry held constant wherever it enters a matrix
    product. Of a GRU that leaves its update gate, of an LSTM its forget gate, of a leaky network 1 − a, of a plain tanh
    network nothing; a cell without such a product keeps all of ∂F/∂h. Every parameter has the trace of its own layer,
    and the signal comes down through the layers above within the step, as with ``deep_eprop(network, hops=0)``.

    The paper sends the error back through fixed random weights. Here it comes back through the weights themselves.

    *Exact when* the network has one recurrent layer, without a matrix product that reads its carry.

    *Cost* per step and example: kept here as full matrices, n |θ| numbers, of which one per parameter and carry leaf is
    used: this file is there to see what the rule learns, not how fast it is.

    Args:
      network: as ``deep_eprop`` takes it.

    Returns:
      An ``OnlineLearner``. Its ``value_and_grad`` goes step by step.

    Raises:
      ValueError: in ``init``, a cell whose units are coupled otherwise than by matrix products, such as a convolution.

    Reference: J. M. Murray, "Local online learning in recurrent networks with random feedback", eLife 8 (2019),
    e43299.

    >>> from deepeprop_jax.cells import leaky_rnn
    >>> learner = rflo(leaky_rnn(4))
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2))
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(6))
    """
    rule = with_past(_past, _kept)
    return by_steps(network, lambda cell: rule, rflo)


def _past(kept: np.ndarray, taken: Taken, S_tm1: jax.Array) -> jax.Array:
    blocks = [leak(visit, S_tm1.dtype) for visit in taken.visits]
    return jax.scipy.linalg.block_diag(*blocks) @ S_tm1


def _kept(plan: Plan, params: RealView) -> np.ndarray:
    """Of each parameter its own layer's carry: within it L and ∂F/∂θ leave the rest zero."""
    layers = layers_of(plan)
    kept = np.zeros((size_of(layers), params.size), bool)
    for layer in layers:
        for entries in places(plan, layer, params):
            kept[layer.own, entries.ravel()] = True
    return kept


def leak(visit: Visit, dtype: np.dtype) -> jax.Array:
    """L of a layer: ∂F/∂h with the carry held constant where it enters a matrix product, (n, n)."""
    node = visit.layer.node
    if not node.recurrent:
        return jnp.zeros((0, 0), dtype)
    if node.recurrence is Recurrence.DENSE:
        raise ValueError(
            f"Node '{node.name}': rflo needs a cell that is element-wise in its carry but for matrix products; seen "
            f"{node.why}. Use deep_eprop(network, hops=0), which cuts any cell to its units."
        )
    program = _traced(node)
    on_carry = dependents(program.equations, _carry_inputs(program, node))

    def rule(equation: Equation, *values: jax.Array) -> list[jax.Array]:
        reads = not on_carry.isdisjoint(variables(equation.inputs))
        if reads and equation.name == "dot_general":
            values = jax.lax.stop_gradient(values)
        return bind(equation, *values)

    def next_carry(h: list[jax.Array]) -> jax.Array:
        given = (visit.params, h, visit.input, visit.others, jax.lax.stop_gradient(visit.carry_tm1))
        known = dict(zip(program.inputs, jax.tree.leaves(given), strict=True))
        outputs = evaluate(program.equations, program.constants | known, program.outputs, rule)
        return vector(outputs[: len(h)], dtype)

    jacobian = jax.jacrev(next_carry)(visit.carry_tm1)
    n = node.carry.size
    return jnp.concatenate([part.reshape(n, -1).astype(dtype) for part in jacobian], axis=1)


def _traced(node: Node) -> Program:
    """F of a node as a program of (params, carry_tm1, input, others, point)."""
    views = (node.params, node.carry, node.input)
    reals, others = [view.real_avals for view in views], tuple(view.other_avals for view in views)
    return trace(node.cut.next_carry, *reals, others, node.carry.real_avals)


def _carry_inputs(program: Program, node: Node) -> list:
    start = len(node.params.real_avals)
    return program.inputs[start : start + len(node.carry.real_avals)]
