"""Learners and cells as Python objects: their help, hashes, copies and pickles; the package's version."""

from __future__ import annotations

import copy
import inspect
import pickle
import tomllib
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import deepeprop_jax
from deepeprop_jax import Cell, deep_eprop, graph, hoisted_bptt, linen_cell, nnx_cell, params_to_nnx, stack
from deepeprop_jax.cells import SuperSpike, alif, elstm, indrnn, leaky_readout, leaky_rnn, lif, lru, rtu
from deepeprop_jax.learner.contract import Gradient, Init, Reset, RunSequence, Step, ValueAndGrad

X = jnp.ones((2, 3), jnp.float32)


def own_cell(params, carry, x):
    carry = jnp.tanh(params * carry + x.sum())
    return carry, carry


def own_init(key, x):
    return jax.random.normal(key, ()), jnp.zeros(len(x))


def branching():
    nodes = {
        "low": (leaky_rnn(3), "input"),
        "own": (Cell(own_init, own_cell), "low"),
        "named": (Cell(own_init, lambda p, h, x: own_cell(p, h, x["a"] + x["b"])), {"a": "low", "b": "input"}),
        "high": (lif(2), ("input", "low")),
    }
    return graph(nodes, outputs=("named", "high"))


def picklable():
    nodes = {"low": (leaky_rnn(3), "input"), "high": (lif(2, refractory=2.0), ("input", "low"))}
    return graph(nodes, outputs=("low", "high"))


def loss_fn(y, target):
    return jnp.mean(y) * target


def test_help_shows_the_contract():
    learner = deep_eprop(own_cell)
    contracts = {
        learner.init: Init,
        learner.step: Step,
        learner.gradient: Gradient,
        learner.value_and_grad: ValueAndGrad,
        learner.value_and_grad(loss_fn): RunSequence,
        learner.reset: Reset,
    }
    for function, contract in contracts.items():
        text = inspect.getdoc(function)
        assert text == inspect.getdoc(contract)
        assert "Args:" in text
        for name in list(inspect.signature(function).parameters):
            assert f"{name}:" in text, (contract, name)
        assert list(inspect.signature(function).parameters) == list(inspect.signature(contract.__call__).parameters)[1:]
    assert inspect.getdoc(jax.jit(learner.step)) == inspect.getdoc(Step)
    for function in (hoisted_bptt(own_cell), hoisted_bptt(own_cell)(loss_fn), learner.plan):
        assert inspect.getdoc(function)


def test_examples_in_docstrings_use_public_names():
    import doctest

    for name in deepeprop_jax.__all__:
        for example in doctest.DocTestFinder(recurse=False).find(getattr(deepeprop_jax, name), name, globs={}):
            source = "".join(part.source for part in example.examples)
            assert "as_cell" not in source and "Planner" not in source, name


def test_version_is_that_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert deepeprop_jax.__version__ == project["version"]


@pytest.mark.mixed_promotion
def test_learners_and_networks_hash_whatever_their_wires():
    networks = [branching(), stack(branching(), nn.Dense(2)), stack(gru(), depth=2), nnx_cell(make_nnx), own_cell]
    for network in networks:
        learner = deep_eprop(network)
        assert hash(learner) == hash(copy.deepcopy(learner)) and learner == copy.deepcopy(learner)
        assert hash(learner.network) == hash(copy.copy(learner.network))
        assert copy.deepcopy(learner) is learner
    network = networks[0]
    # Equal graphs have equal hashes, in whatever order their dicts were written.
    vertex = network.graph.nodes[2]
    assert isinstance(vertex.wire, dict)
    turned = vertex._replace(wire=dict(reversed(vertex.wire.items())))
    assert turned == vertex and hash(turned) == hash(vertex)
    assert hash(vertex._replace(wire={"a": 0, "b": 0})) != hash(vertex)

    def as_static(cell, params, carry, x):
        return jax.vmap(cell.apply, in_axes=(None, 0, 0))(params, carry, x)[1]

    once = jax.jit(chex.assert_max_traces(as_static, n=1), static_argnums=0)
    y = once(network, *network.init(jax.random.key(0), X), X)
    chex.assert_trees_all_equal(y, once(copy.deepcopy(network), *network.init(jax.random.key(0), X), X))
    chex.clear_trace_counter()


def gru():
    return nn.GRUCell(features=3)


def make_nnx(rngs):
    return nnx.GRUCell(3, 4, rngs=rngs)


NETWORKS = {
    "plain function": lambda: own_cell,
    "Cell": lambda: Cell(own_init, own_cell),
    "stack": lambda: stack(leaky_rnn(4), lru(3, 4), alif(3), leaky_readout(2)),
    "options": lambda: stack(
        elstm(4), rtu(3), indrnn(3), lif(3, surrogate=SuperSpike(), reset="zero"), leaky_readout(2, use_bias=False)
    ),
    "depth": lambda: stack(leaky_rnn(3), depth=2),
    "graph": picklable,
    "nnx": lambda: nnx_cell(make_nnx),
}


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("name", list(NETWORKS))
def test_learners_pickle_as_the_call_that_made_them(name):
    network = NETWORKS[name]()
    learner = deep_eprop(network, hops=0, exact=name == "Cell")
    params, carry = (jnp.ones(()), jnp.zeros(2)) if name == "plain function" else network.init(jax.random.key(0), X)
    shapes = jax.eval_shape(learner.init, params, carry, X)
    again = pickle.loads(pickle.dumps(learner))
    assert jax.tree.structure(jax.eval_shape(again.init, params, carry, X)) == jax.tree.structure(shapes)
    assert str(jax.eval_shape(again.init, params, carry, X)) == str(shapes)
    assert again.plan(params, carry, X)[2:5] == learner.plan(params, carry, X)[2:5] == (name == "Cell", 0, None)
    if name not in ("plain function", "Cell"):
        cell = pickle.loads(pickle.dumps(network))
        chex.assert_trees_all_equal(cell.init(jax.random.key(0), X), (params, carry))


def test_what_was_changed_by_hand_is_not_pickled_as_what_it_was():
    network = stack(leaky_rnn(4))
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        pickle.dumps(network._replace(apply=own_cell))


def test_flax_modules_pickle_with_cloudpickle():
    """Plain ``pickle`` refuses the functions that they hold."""
    cloudpickle = pytest.importorskip("cloudpickle")
    for network in (stack(linen_cell(gru()), nn.Dense(2)), nnx_cell(lambda rngs: make_nnx(rngs))):
        learner = deep_eprop(network, hops=0)
        params, carry = network.init(jax.random.key(0), X)
        shapes = jax.eval_shape(learner.init, params, carry, X)
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(learner)
        again = pickle.loads(cloudpickle.dumps(learner))
        assert str(jax.eval_shape(again.init, params, carry, X)) == str(shapes)


def test_an_instance_that_has_changed_since_is_pickled_with_the_params_that_init_gives():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    network = stack(module)
    params, carry = network.init(jax.random.key(0), X)
    module.kernel[...] = jnp.zeros_like(module.kernel[...])
    for again in (pickle.loads(pickle.dumps(network)), pickle.loads(pickle.dumps(deep_eprop(network))).network):
        chex.assert_trees_all_equal(again.init(jax.random.key(0), X), (params, carry))
    assert params[0]["kernel"].any()
    params_to_nnx(again, jax.tree.map(jnp.ones_like, params))
    assert not module.kernel[...].any()
    stack(network, again)  # would be refused if they shared an instance
