"""Eligibility traces are the derivatives of a node's carry by its own parameters, in forward mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import deep_eprop, eligibility
from deepeprop_jax.network.cell import connect, graph_of, select
from deepeprop_jax.reference import localised
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import problem, start


def derivative(p, v, exact, steps):
    """dh^v/dtheta^v of the first example after ``steps``: per carry leaf and parameter leaf."""
    vertices = graph_of(p.network).nodes
    cells = [pair.apply if exact else localised(pair) for pair in p.pairs]

    def carry_of(own):
        params = [own if w == v else select(p.params, vertex.path) for w, vertex in enumerate(vertices)]
        carry = [jax.tree.map(lambda leaf: leaf[0], select(p.carry, vertex.path)) for vertex in vertices]
        for x in p.xs[:steps, 0]:
            outputs = {}
            for w, cell in enumerate(cells):
                u = connect(vertices[w].wire, x, outputs)
                carry[w], outputs[w] = cell(params[w], carry[w], u)
        return jax.tree.leaves(carry[v])

    return jax.jacrev(carry_of)(select(p.params, vertices[v].path))


def run(p, learner, steps):
    state = start(learner, p)
    for x in p.xs[:steps]:
        state, _ = learner.step(p.params, state, x)
    return state


@pytest.mark.parametrize(
    ("name", "v", "options"),
    [
        ("stack_3", 1, {"exact": True}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("stack_3", 1, {}),
                ("stack_3", 1, {"hops": 0}),
                ("stack_3_spiking", 0, {}),
                ("stack_3_spiking", 1, {"hops": 0}),
                ("graph_diamond", 2, {}),
                ("graph_diamond", 1, {"exact": True}),
                ("stack_5_recurrent", 2, {}),
            ]
        ),
    ],
)
def test_it_is_the_derivative_of_the_carry(name, v, options):
    """Local rows, and dense ones with exact=True; the last step is in it."""
    p, steps, exact = problem(name), 4, options.get("exact", False)
    node, learner = graph_of(p.network).nodes[v], deep_eprop(p.network, **options)
    own = learner.plan(p.params, p.carry, p.xs[0]).nodes[v]
    state, needed = run(p, learner, steps), derivative(p, v, exact, steps)
    own_params = jax.tree.leaves_with_path(select(p.params, node.path))
    for number, (path, leaf) in enumerate(own_params):
        parameter = jax.tree_util.keystr(path, simple=True, separator="/")
        found = eligibility(learner, p.params, state, node.name, parameter)
        assert set(found) <= set(own.carry.names)
        for place, whole in enumerate(needed):
            whole = jax.tree.leaves(whole)[number]
            name_of_leaf = str(place) if len(needed) > 1 else own.carry.names[0]
            if name_of_leaf not in own.carry.names:
                continue  # a spike, which follows from the others
            if exact and not own.elementwise:
                trace = found.get(name_of_leaf, jnp.zeros((3, *whole.shape)))
            else:  # each entry reaches one unit: the sum over the units is that one
                trace, whole = found.get(name_of_leaf, jnp.zeros((3, *leaf.shape))), whole.sum(0)
            assert trace.shape[1:] == whole.shape
            assert_same_gradient(trace[0], whole, FLOAT64, f"{name}, {parameter}, {place}")


@pytest.mark.slow
def test_of_low_rank_with_depth_and_beside_a_projected_carry():
    p = problem("stack_3")
    names = "params/hi/kernel", "params/hg/bias"
    plain = deep_eprop(p.network, hops=0)
    for options in ({"hops": 0, "rank": 12}, {"carry_rank": 1, "own_traces": True, "project_every": 1}):
        learner = deep_eprop(p.network, **options)
        for name in names:
            found, needed = (eligibility(one, p.params, run(p, one, 3), "1", name) for one in (learner, plain))
            assert_same_gradient(found, needed, 1e-6, f"{options}, {name}")
    deep = problem("depth_4")
    learner = deep_eprop(deep.network, hops=0)
    leaf = learner.plan(deep.params, deep.carry, deep.xs[0]).nodes[0].params.names[0]
    found = eligibility(learner, deep.params, run(deep, learner, 2), graph_of(deep.network).nodes[0].name, leaf)
    assert found and all(trace.shape[:2] == (4, 3) for trace in found.values())
    low = deep_eprop(deep.network, hops=0, rank=9)
    again = eligibility(low, deep.params, run(deep, low, 2), graph_of(deep.network).nodes[0].name, leaf)
    assert_same_gradient(again, found, 1e-6)


def test_a_spike_has_no_trace_of_its_own():
    p = problem("lif")
    learner = deep_eprop(p.network)
    found = eligibility(learner, p.params, run(p, learner, 3), "cell", "input_kernel")
    assert {name: trace.shape for name, trace in found.items()} == {"0": (3, 2, 3)}


@pytest.mark.parametrize(
    ("options", "node", "name", "message"),
    [
        ({}, "top", "params/hi/kernel", "no node 'top'"),
        ({}, "1", "kernel", "no parameter 'kernel'"),
        ({"carry_rank": 1}, "1", "params/hi/kernel", "own_traces=True"),
        ({"trainable": lambda params: jax.tree.map(lambda _: False, params)}, "1", "params/hi/kernel", "is masked"),
    ],
)
def test_mistakes_are_refused(options, node, name, message):
    p = problem("stack_3")
    learner = deep_eprop(p.network, **options)
    with pytest.raises(ValueError, match=message):
        eligibility(learner, p.params, start(learner, p), node, name)
