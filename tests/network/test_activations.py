"""Plain functions in networks: an activation is a feed-forward node, a step is a cell, and the rest is refused."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, analyse, deep_eprop, graph, hoisted_bptt, stack
from tests.advice import BATCH, KEY, XS, check_exact, in_float64, loss_fn, refused
from tests.gradients import FLOAT64, assert_same_gradient


class Scale:
    """A callable object; with an array inside, it would be a layer whose weights nobody trains."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "tanh": jnp.tanh,
    "lax_tanh": jax.lax.tanh,
    "softmax": jax.nn.softmax,
    "standardize": jax.nn.standardize,
    "partial": functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
    "pytree_partial": jax.tree_util.Partial(jax.nn.leaky_relu, negative_slope=0.1),
    "lambda": lambda x: x * jnp.sin(x),
    "jitted": jax.jit(lambda x: x**2),
    "ufunc": jnp.frompyfunc(lambda x: x + 1, 1, 1),
    "abs": abs,
    "object": Scale(2.0),
    "default": lambda x, scale=3.0: scale * x,
}


def test_activations_are_nodes_without_parameters():
    """All at once, batched, eager and compiled, and exact between recurrent layers."""
    network = stack(*ACTIVATIONS.values())
    params, carry = network.init(KEY, XS[0])
    assert params == carry == ((),) * len(ACTIVATIONS)
    step = jax.vmap(network.apply, in_axes=(None, 0, 0))
    needed = XS[0]
    for function in ACTIVATIONS.values():
        needed = jax.vmap(function)(needed)
    np.testing.assert_allclose(step(params, carry, XS[0])[1], needed, rtol=FLOAT64)
    np.testing.assert_allclose(jax.jit(step)(params, carry, XS[0])[1], needed, rtol=FLOAT64)


@pytest.mark.mixed_promotion
def test_gradients_through_activations_are_those_of_bptt():
    """In a stack and in a graph, where a function of a dict of parents is a gate."""
    gate = graph(
        {
            "low": (nn.SimpleCell(4), "input"),
            "soft": (jax.nn.softmax, "low"),
            "leaky": (functools.partial(jax.nn.leaky_relu, negative_slope=0.1), "low"),
            "gate": (lambda x: x["a"] * x["b"], {"a": "soft", "b": "leaky"}),
            "high": (nn.SimpleCell(3), "gate"),
        },
        outputs="high",
    )
    network = stack(jnp.tanh, gate, nn.gelu, nn.Dense(2))
    grads = check_exact(network)
    assert jax.tree.structure(grads[0]) == jax.tree.structure(())
    assert all(float(jnp.linalg.norm(leaf)) > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.mixed_promotion
def test_step_by_step_and_hoisted_and_analyse():
    network = stack(nn.GRUCell(4), nn.relu, nn.Dense(2))
    learner = deep_eprop(network, exact=True)
    params, carry = in_float64(network.init(KEY, XS[0]))
    state = learner.init(params, carry, XS[0])
    assert "feed-forward" in str(analyse(network, params, carry, XS[0]))

    @jax.jit
    def by_steps(params, state):
        def step(state, x):
            state, y = learner.step(params, state, x)
            return state, learner.gradient(params, state, jax.grad(lambda y: loss_fn(y, 0.5))(y))

        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.lax.scan(step, state, XS)[1])

    hoisted = jax.jit(hoisted_bptt(network)(loss_fn))
    (_, _), needed = hoisted(params, carry, XS, jnp.full(len(XS), 0.5))
    assert_same_gradient(by_steps(params, state), needed, FLOAT64)


def test_an_activation_alone_is_a_network():
    learner = deep_eprop(nn.relu)
    params, carry = learner.network.init(KEY, XS[0])
    state = learner.init(params, carry, XS[0])
    (loss, _), grads = learner.value_and_grad(loss_fn)(params, state, XS, jnp.zeros(len(XS)))
    assert grads == ()
    assert jnp.allclose(loss, sum(loss_fn(nn.relu(x), 0.0) for x in XS))


@pytest.mark.parametrize(
    "step",
    [
        lambda params, carry, x: (carry + params * x, carry),
        lambda params, carry, x, rate=0.5: (carry + rate * params * x, carry),
        lambda *given: (given[1] + given[0] * given[2], given[1]),
        functools.partial(lambda rate, params, carry, x: (carry + rate * params * x, carry), 0.5),
        jax.jit(lambda params, carry, x: (carry + params * x, carry)),
    ],
    ids=["three", "three and a default", "any", "partial", "jitted"],
)
def test_a_step_of_three_arguments_is_a_cell(step):
    cell = deep_eprop(step).network
    carry, _ = cell.apply(jnp.ones(2), jnp.zeros(2), jnp.ones(2))
    assert float(carry[0]) in (0.5, 1.0)
    refused(lambda: cell.init(KEY, XS[0]), ValueError, "no initialiser.*lambda x:")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (np.tanh, "jnp.tanh"),
        (math.tanh, "jnp.tanh"),
        (jnp.add, r"takes 2 arguments.*lambda x: add\(\*x\)"),
        (lambda carry, x: (carry, x), r"2 arguments \(carry, x\).*lambda params, carry, x: f\(carry, x\)"),
        (lambda a, b, c, d: a, "4 arguments.*functools.partial"),
        (lambda: 0, "0 arguments"),
        (lambda x, *, rate: rate * x, r"keyword arguments rate.*rate=\.\.\."),
        (Scale(jnp.ones(2)), r"Scale.*holds arrays \(factor\).*Cell\(init, apply\)"),
        (nn.GRUCell, r"class GRUCell.*GRUCell\(\.\.\.\)"),
        ([nn.Dense(3), nn.relu], r"list.*stack\(\*layers\)"),
        (nn.Dense(3).__call__, "method __call__ of a Dense"),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
@pytest.mark.parametrize("where", [deep_eprop, stack, lambda f: graph({"a": (f, "input")}, outputs="a")])
def test_other_functions_are_refused(function, message, where):
    refused(lambda: where(function), TypeError, message)


def test_what_two_argument_functions_are_told_to_write_works():
    def pair(carry, x):
        return 0.5 * carry + x, carry

    step = Cell(
        lambda key, x: ((), jnp.zeros_like(x)), deep_eprop(lambda params, carry, x: pair(carry, x)).network.apply
    )
    added = graph({"a": (step, "input"), "b": (lambda x: jnp.add(*x.values()), {"x": "a", "y": "input"})}, outputs="b")
    params, carry = added.init(KEY, XS[0])
    _, y = jax.vmap(added.apply, in_axes=(None, 0, 0))(params, carry, XS[0])
    np.testing.assert_allclose(y, XS[0])
    assert y.shape[0] == BATCH
