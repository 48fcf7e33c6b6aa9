"""Many small layers written out: their influences move together, and the program grows with the depth alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop, stack
from deepeprop_jax.segments import joint
from tests.zoo import problem, squared_error

KINDS = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def gru(features):
    return nn.GRUCell(features=features, **KINDS)


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * (1 + np.abs(b).max(initial=0)))


def by_length(learner, loss_fn, arguments, length, **flags):
    """A sequence twice, the second time from the state that the first one left."""
    params, state, *sequence = arguments
    run = jax.jit(learner.value_and_grad(loss_fn, segment_length=length))
    first = run(params, state, *sequence, **flags)
    return first, run(params, first[0][1], *sequence, **flags)


def test_a_deep_stack_equals_one_node_after_the_other(monkeypatch):
    """A ladder of three, with other layers below and above; a step is pending at the start."""
    monkeypatch.setattr(joint, "_FEWEST", 3)
    network = stack(gru(2), nn.Dense(3, **KINDS), *[gru(3)] * 3, nn.Dense(2, **KINDS))
    keys = iter(jax.random.split(jax.random.key(0), 6))
    xs = jax.random.normal(next(keys), (5, 2, 2), jnp.float64)
    params, carry = network.init(next(keys), xs[0])
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    targets = jax.random.normal(next(keys), (5, 2, 2), jnp.float64)
    flags = {
        "resets": jax.random.bernoulli(next(keys), 0.2, (5, 2)),
        "valid": jax.random.bernoulli(next(keys), 0.8, (5, 2)),
    }
    learner = deep_eprop(network)
    state, _ = learner.step(params, learner.init(params, carry, xs[0]), xs[0])
    arguments = (params, state, xs, targets)

    def loss_fn(y, target):
        return jnp.sum((y - target) ** 2)

    plan = learner.plan(params, carry, xs[0])
    assert joint.applies(plan, 2, 2)
    assert joint.ladder_of(plan) == dict.fromkeys((2, 3, 4), (2, 3, 4))
    together = by_length(learner, loss_fn, arguments, 2, **flags)
    monkeypatch.setattr(joint, "_FEWEST", 1000)
    close(together, by_length(learner, loss_fn, arguments, 1, **flags))


def test_joint_rows_in_a_graph_equal_those_of_one_node_after_the_other(monkeypatch):
    """Two branches that meet again, and rows that only some sources see."""
    monkeypatch.setattr(joint, "_FEWEST", 2)
    p = problem("graph_diamond")
    learner = deep_eprop(p.network, hops=1)
    state = learner.init(p.params, p.carry, jax.tree.map(lambda leaf: leaf[0], p.xs))
    arguments = (p.params, state, p.xs, p.targets)
    together = by_length(learner, squared_error, arguments, 2)
    monkeypatch.setattr(joint, "_FEWEST", 1000)
    close(together, by_length(learner, squared_error, arguments, 1))


def equations(jaxpr):
    """Equations of a jaxpr and all inside it."""
    inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for p in e.params.values() for v in jax.tree.leaves([p])]
    return len(jaxpr.eqns) + sum(equations(i) for i in inner if hasattr(i, "eqns"))


@pytest.mark.parametrize("hops, most", [(0, 800), (None, 1000)])
def test_a_program_grows_with_the_depth_alone(hops, most):
    """At most so many equations a layer, where every pair of layers had some hundred before, with all hops."""
    counts = []
    for layers in (10, 20):
        learner = deep_eprop(stack(*[nn.GRUCell(features=4)] * layers), hops=hops)
        xs = jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)
        x = jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype)
        params, carry = jax.eval_shape(learner.network.init, jax.random.key(0), x)
        state = jax.eval_shape(learner.init, params, carry, x)
        run = learner.value_and_grad(lambda y, target: jnp.sum((y - target) ** 2), segment_length=4)
        counts.append(equations(jax.make_jaxpr(run)(params, state, xs, jax.ShapeDtypeStruct((8,), xs.dtype)).jaxpr))
    assert counts[0] < 10 * most
    assert counts[1] < 2.1 * counts[0]


def test_equal_modules_are_analysed_once():
    layers = [nn.GRUCell(features=3) for _ in range(4)]
    learner = deep_eprop(stack(*layers))
    x = jnp.ones((2, 3), jnp.float32)
    params, carry = learner.network.init(jax.random.key(0), x)
    plan = learner.plan(params, carry, x)
    # The lowest one is another node: its input, the network's, has no derivative.
    assert plan.nodes[1].cut is plan.nodes[2].cut is plan.nodes[3].cut
    assert [node.name for node in plan.nodes] == ["0", "1", "2", "3"]
