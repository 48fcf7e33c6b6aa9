"""Situations from public reports with Flax: initialisation under transformations, frozen params, lifted transforms."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from deepeprop_jax import deep_eprop, graph, linen_cell, nnx_cell, stack
from deepeprop_jax.reference import Pair, bptt
from tests.gradients import FLOAT64, SAME, assert_same_gradient
from tests.public_reports.situations import BATCH, INPUTS, STEPS, TARGETS, UNITS, judge, loss_fn, numbers

XS = numbers(1, STEPS, BATCH, INPUTS, scale=1.0)
X = XS[0].astype(jnp.float32)
KEY = jax.random.key(0)


class Recurrent(nn.RNNCellBase):
    """A carry of zeros."""

    features: int = UNITS

    def kernel(self, name: str, features: int | None = None) -> nn.Dense:
        return nn.Dense(features or self.features, name=name)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features), jnp.float32)


class Inner(nn.Module):
    """One inner step: x may be None."""

    features: int = UNITS

    @nn.compact
    def __call__(self, h, x=None):
        h = nn.tanh(nn.Dense(self.features)(h)) if x is None else nn.tanh(nn.Dense(self.features)(h) + x)
        return h, None


class Ponders(Recurrent):
    """``nn.scan`` over three inner steps with the same weights."""

    @nn.compact
    def __call__(self, h, x):
        again = nn.scan(Inner, variable_broadcast="params", split_rngs={"params": False}, length=3)
        h, _ = again(self.features)(h + self.kernel("in")(x))
        return h, h


class Deepens(Recurrent):
    """``nn.scan`` over two layers with weights of their own, which see the input."""

    @nn.compact
    def __call__(self, h, x):
        layers = nn.scan(
            Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2, in_axes=nn.broadcast
        )
        h, _ = layers(self.features)(h, self.kernel("in")(x))
        return h, h


class Heads(Recurrent):
    """``nn.vmap`` over two heads with weights of their own."""

    heads: int = 2

    @nn.compact
    def __call__(self, h, x):
        heads = nn.vmap(nn.SimpleCell, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, None))
        return heads(self.features)(h, x)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.heads, self.features), jnp.float32)


class SharedHeads(Heads):
    """``nn.vmap`` over two heads with the same weights."""

    @nn.compact
    def __call__(self, h, x):
        shared = nn.vmap(Inner, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=0)
        h, _ = shared(self.features)(h, jnp.stack([self.kernel("in")(x), self.kernel("other")(x)]))
        return h, h


def in_float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


@pytest.mark.slow
def test_lifted_transforms_inside_a_cell():
    cells = {kind.__name__: linen_cell(kind()) for kind in (Ponders, Deepens, Heads, SharedHeads)}
    network = graph({name: (cell, "input") for name, cell in cells.items()}, outputs=tuple(cells))
    pairs = [
        Pair(lambda p, h, x, cell=cell: cell.apply(p, h, x)[0], lambda p, h_t, h, x: h_t) for cell in cells.values()
    ]
    params, carry = network.init(KEY, X)
    # Biases start at zero and the carry too: none of that by luck.
    draw = iter(range(1000))
    params, carry = jax.tree.map(
        lambda leaf: leaf + numbers(next(draw), *leaf.shape, scale=0.3), in_float64((params, carry))
    )
    judge(network, pairs, params, carry, XS, must_differ=True)


NNX = {
    "lstm": lambda rngs: nnx.LSTMCell(INPUTS, UNITS, rngs=rngs),
    "optimized_lstm": lambda rngs: nnx.OptimizedLSTMCell(INPUTS, UNITS, rngs=rngs),
    "gru": lambda rngs: nnx.GRUCell(INPUTS, UNITS, rngs=rngs),
}


def test_nnx_cells_are_made_under_jit_eval_shape_and_vmap():
    network = graph({name: (nnx_cell(factory), "input") for name, factory in NNX.items()}, outputs=tuple(NNX))
    eager = network.init(KEY, X)
    shapes = jax.eval_shape(network.init, KEY, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [(a.shape, a.dtype) for a in jax.tree.leaves(eager)]
    assert_same_gradient(jax.jit(network.init)(KEY, X), eager, 1e-6)
    keys = jax.random.split(KEY, 3)
    params, carry = jax.jit(jax.vmap(network.init, in_axes=(0, None)))(keys, X)
    for kernel in jax.tree.leaves(params):
        # Of every seed its own numbers, but for biases, which start at zero.
        assert kernel.shape[0] == 3 and (not kernel.any() or bool(jnp.any(kernel[0] != kernel[1])))
    last = jax.tree.map(lambda leaf: leaf[2], (params, carry))
    assert_same_gradient(last, network.init(keys[2], X), 1e-6)


def test_nnx_learners_of_several_seeds():
    """Made, initialised and run under one ``vmap``; each seed's gradient is that of BPTT for it."""
    network = stack(nnx_cell(NNX["lstm"]), nnx_cell(lambda rngs: nnx.Linear(UNITS, 2, rngs=rngs)))
    learner = deep_eprop(network, exact=True)

    def of_seed(key):
        params, carry = in_float64(network.init(key, X))
        _, grads = learner.value_and_grad(loss_fn, segment_length=3)(
            params, learner.init(params, carry, XS[0]), XS, TARGETS
        )
        return grads, bptt(network, loss_fn)(params, carry, XS, TARGETS)[1]

    seen, needed = jax.jit(jax.vmap(of_seed))(jax.random.split(KEY, 2))
    assert_same_gradient(seen, needed, FLOAT64)


def test_frozen_params_give_frozen_gradients():
    learner = deep_eprop(stack(nn.SimpleCell(UNITS), nn.Dense(2)))
    params, carry = in_float64(learner.network.init(KEY, X))
    run = jax.jit(learner.value_and_grad(loss_fn, segment_length=3))
    _, needed = run(params, learner.init(params, carry, XS[0]), XS, TARGETS)
    frozen = tuple(freeze(layer) for layer in params)
    state = learner.init(frozen, carry, XS[0])
    (_, state), grads = run(frozen, state, XS, TARGETS)
    assert [type(layer) for layer in grads] == [FrozenDict, FrozenDict]
    assert_same_gradient(grads, tuple(freeze(layer) for layer in needed), SAME)
    state, y = jax.eval_shape(learner.step, frozen, state, XS[0])
    assert jax.tree.structure(jax.eval_shape(learner.gradient, frozen, state, y)) == jax.tree.structure(frozen)


def test_dropout_is_refused_and_the_remedy_works():
    """The mask is drawn outside and fed in as part of x."""
    layers = (nn.GRUCell(UNITS), nn.Dropout(0.5, deterministic=False), nn.Dense(2))
    with pytest.raises(ValueError, match=r"(?s)dropout.*draw the mask outside and feed it in as part of x"):
        deep_eprop(stack(*layers)).network.init(KEY, X)

    def masked(params, carry, inputs):
        return carry, inputs["y"] * inputs["x"]["mask"]

    def recurrent(params, carry, x):
        return gru.apply(params, carry, x["x"])

    gru = linen_cell(layers[0])
    network = graph({"gru": (recurrent, "input"), "drop": (masked, {"y": "gru", "x": "input"})}, outputs="drop")
    params, carry = in_float64(gru.init(KEY, X))
    xs = {"x": XS, "mask": 2 * (numbers(8, STEPS, BATCH, UNITS) > 0).astype(float)}
    judge(network, None, {"gru": params, "drop": ()}, {"gru": carry, "drop": ()}, xs, lengths=(3,))
