"""Bad input: a ValueError or TypeError at trace time that says what was seen, what is needed and what to do."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepeprop_jax import (
    Cell,
    analyse,
    compare_to_bptt,
    deep_eprop,
    graph,
    hoisted_bptt,
    linen_cell,
    nnx_cell,
    stack,
)
from deepeprop_jax.learner.contract import LearnerState

STEPS, BATCH, FEATURES = 4, 3, 2


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def gru(features):
    return nn.GRUCell(features=features)


def loss_fn(y, target):
    return jnp.mean((y - target) ** 2)


class Setup:
    """A learner that works, to be called wrongly: each call takes the right arguments but for those given."""

    def __init__(self, network=None, **options):
        self.learner = deep_eprop(network or stack(gru(4), gru(5), nn.Dense(2)), **options)
        self.xs, self.targets = ones(STEPS, BATCH, FEATURES), ones(STEPS)
        self.params, self.carry = self.learner.network.init(jax.random.key(0), self.xs[0])
        self.state = self.init()

    def init(self, **given):
        own = {"params": self.params, "carry": self.carry, "x": self.xs[0]}
        return self.learner.init(**own | given)

    def step(self, **given):
        own = {"params": self.params, "state": self.state, "x": self.xs[0]}
        return self.learner.step(**own | given)

    def gradient(self, dy, **given):
        own = {"params": self.params, "state": self.state}
        return self.learner.gradient(**own | given, dy=dy)

    def run(self, loss=loss_fn, has_aux=False, **given):
        own = {"params": self.params, "state": self.state, "xs": self.xs, "targets": self.targets}
        return self.learner.value_and_grad(loss, has_aux=has_aux)(**own | given)

    @functools.cached_property
    def result(self):
        """Of a sequence with the right arguments, compiled."""
        return jax.jit(self.learner.value_and_grad(loss_fn))(self.params, self.state, self.xs, self.targets)


@pytest.fixture(scope="module")
def good():
    return Setup()


def other_setup():
    return Setup(stack(gru(3), nn.Dense(2)))


def swapped(params):
    return (params[1], params[0], params[2])


def examples(carry, count):
    return jax.tree.map(lambda leaf: leaf[:count], carry)


def sequence_carry(setup, xs):
    return setup.learner.network.init(jax.random.key(0), xs)[1]


def all_on_a_sequence(setup):
    return setup.run(state=setup.init(carry=sequence_carry(setup, setup.xs), x=setup.xs))


def nnx_on_a_sequence():
    learner, xs = deep_eprop(nnx_cell(lambda rngs: nnx.GRUCell(2, 4, rngs=rngs))), ones(3, 3, 2)
    return learner.init(*learner.network.init(jax.random.key(0), xs), xs[0])


def plain_init(params, carry):
    return deep_eprop(lambda params, carry, x: (carry, x)).init(params, carry, ones(BATCH, FEATURES))


def pending_of(setup, count):
    return setup.state._replace(pending=setup.state.pending._replace(carry=examples(setup.carry, count)))


def carry_changes(change):
    return deep_eprop(lambda params, carry, x: (change(carry), x)).init((), ones(BATCH, 4), ones(BATCH, FEATURES))


def output_missing():
    return deep_eprop(lambda params, carry, x: carry).init((), ones(BATCH, 4), ones(BATCH, FEATURES))


def while_loop():
    def cell(params, carry, x):
        return jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + params, carry), x

    return deep_eprop(cell).init(ones(), ones(BATCH, 4), ones(BATCH, FEATURES))


def joined_outputs_clash():
    gives_dict = Cell(lambda key, x: ((), ()), lambda params, carry, x: (carry, {"u": x}))
    return Setup(graph({"a": (gives_dict, "input"), "b": (nn.Dense(2), ("a", "input"))}, outputs="b"))


def no_initialiser(x):
    return deep_eprop(lambda params, carry, x: (carry, x)).network.init(jax.random.key(0), x)


VALUE_ERRORS = {
    # Shapes and dtypes of one step.
    "wrong batch size of carry": (r"batch axis.*carry", lambda s: s.init(carry=examples(s.carry, 2))),
    "wrong batch size of x": (r"x.*needed", lambda s: s.step(x=s.xs[0, :2])),
    "scalar carry leaf": (r"scalar", lambda s: s.init(carry=(s.carry[0], ones(), ()))),
    "empty batch": (r"batch is empty", lambda s: s.init(carry=examples(s.carry, 0), x=s.xs[0, :0])),
    "wrong feature size": (r"x.*float32\[3, 7\]", lambda s: s.step(x=ones(BATCH, 7))),
    "wrong feature size at init": (r"Node '0'", lambda s: s.init(x=ones(BATCH, 7))),
    "input of another dtype": (r"int32", lambda s: s.step(x=ones(BATCH, FEATURES, dtype=jnp.int32))),
    "a whole sequence at init": (r"ONE step.*xs\[0\]", lambda s: s.init(x=s.xs)),
    "network.init on a sequence": (r"ONE step.*xs\[0\]", lambda s: s.init(carry=sequence_carry(s, s.xs))),
    "network.init on a sequence as long as the batch": (
        r"GRUCell.*\[3, 4\].*whole sequence",
        lambda s: s.init(carry=sequence_carry(s, s.xs[:BATCH])),
    ),
    "an NNX cell on a sequence as long as the batch": (r"GRUCell.*whole sequence", lambda s: nnx_on_a_sequence()),
    "all of init on a sequence": (r"network.init and learner.init take ONE step", lambda s: all_on_a_sequence(s)),
    "a whole sequence in step": (r"learner.step takes ONE step", lambda s: s.step(x=s.xs)),
    "batch before time": (r"Time is the first axis", lambda s: s.run(xs=s.xs.swapaxes(0, 1), targets=ones(BATCH))),
    "scalar carry of a plain function": (r"scalar.*jnp.full", lambda s: plain_init(ones(), 0.0)),
    # Sequences.
    "missing time axis": (r"\(time, batch", lambda s: s.run(xs=ones(3))),
    "one step as a sequence": (r"xs has 3 steps", lambda s: s.run(xs=s.xs[0])),
    "empty sequence": (r"empty sequence", lambda s: s.run(xs=s.xs[:0], targets=s.targets[:0])),
    "target of the wrong length": (r"xs has 4 steps", lambda s: s.run(targets=ones(5))),
    "scalar target": (r"targets.*first axis", lambda s: s.run(targets=ones())),
    "missing target": (r"targets has no arrays", lambda s: s.run(targets=())),
    "reset flags of the wrong shape": (r"\(3,\)", lambda s: s.learner.reset(s.state, ones(2, dtype=bool))),
    "resets of the wrong shape": (r"\(4, 3\)", lambda s: s.run(resets=ones(STEPS, dtype=bool))),
    "resets of numbers": (r"boolean", lambda s: s.run(resets=ones(STEPS, BATCH))),
    "valid of the wrong shape": (r"\(4, 3\)", lambda s: s.run(valid=ones(BATCH, STEPS, dtype=bool))),
    # Params, carry and state of something else.
    "carry of another network": (r"carry.*tuple of 3", lambda s: s.init(carry=other_setup().carry)),
    "params of another network": (r"params.*tuple of 3", lambda s: s.init(params=other_setup().params)),
    "params without the stack's tuple": (r"tuple of 3.*dict", lambda s: s.init(params=s.params[0])),
    "layers swapped": (r"Node '0'", lambda s: s.init(params=swapped(s.params))),
    "layers swapped after init": (
        r"Node .0. could not be applied.*its params",
        lambda s: s.run(params=swapped(s.params)),
    ),
    "state of another network": (r"carry.*another network", lambda s: s.run(state=other_setup().state)),
    "state of another mode": (r"traces", lambda s: s.run(state=Setup(exact=True).state)),
    "pending carry of another batch": (r"pending carry", lambda s: s.step(state=pending_of(s, 2))),
    "reset of a state of another network": (
        r"carry.*another network",
        lambda s: s.learner.reset(other_setup().state, ones(BATCH, dtype=bool)),
    ),
    "reset of a state with other nodes": (
        r"'cell <- cell' is none of this network.*\['layers'\]",
        lambda s: deep_eprop(stack(gru(4), depth=2)).reset(Setup(gru(4)).state, ones(BATCH, dtype=bool)),
    ),
    "state of another hops": (r"traces", lambda s: s.run(state=Setup(hops=0).state)),
    # The gradient of a step, and losses.
    "gradient without a step": (r"learner.step first", lambda s: s.gradient(ones(BATCH, 2))),
    "gradient after a sequence": (
        r"learner.step first",
        lambda s: s.gradient(ones(BATCH, 2), state=s.result[0][1]),
    ),
    "dy of the wrong shape": (r"dy.*\[3, 2\]", lambda s: s.gradient(ones(BATCH, 9), state=s.step()[0])),
    "dy of the wrong structure": (r"structure", lambda s: s.gradient((ones(BATCH, 2),), state=s.step()[0])),
    "loss that is no scalar": (r"scalar", lambda s: s.run(lambda y, t: (y - t) ** 2)),
    "losses of the wrong number": (r"one loss per example, of shape \(3,\)", lambda s: s.run(lambda y, t: y[0])),
    "loss of integers": (r"scalar", lambda s: s.run(lambda y, t: jnp.zeros((), jnp.int32))),
    "loss with aux unannounced": (r"has_aux=True", lambda s: s.run(lambda y, t: (jnp.sum(y), y))),
    "aux missing": (r"\(loss, aux\)", lambda s: s.run(lambda y, t: jnp.sum(y), has_aux=True)),
    # Options.
    "hops negative": (r"hops.*-1", lambda s: deep_eprop(gru(4), hops=-1)),
    "trainable of another structure": (r"trainable", lambda s: Setup(trainable=(True, False))),
    "trainable without booleans": (r"booleans", lambda s: Setup(trainable=(1.0, True, True))),
    # Cells.
    "dropout": (r"(?i)dropout", lambda s: Setup(stack(gru(4), nn.Dropout(0.5, deterministic=False)))),
    "batch norm": (r"BatchNorm|batch_stats", lambda s: Setup(stack(gru(4), nn.BatchNorm(use_running_average=False)))),
    "init of a plain function": (r"no initialiser", lambda s: no_initialiser(s.xs[0])),
    "carry changes shape": (r"Node 'cell'.*float32\[4\].*float32\[2\]", lambda s: carry_changes(lambda h: h[:2])),
    "carry changes dtype": (r"Node 'cell'.*int32", lambda s: carry_changes(lambda h: h.astype(jnp.int32))),
    "carry changes structure": (r"Node 'cell'", lambda s: carry_changes(lambda h: (h, h))),
    "cell returns one value": (r"\(carry, y\)", lambda s: output_missing()),
    "reverse-mode through a while loop": (r"Node 'cell'", lambda s: while_loop()),
    # Stacks and graphs.
    "unknown parent": (r"unknown parent 'c'", lambda s: graph({"a": (nn.Dense(2), "c")}, outputs="a")),
    "cycle": (r"cycle", lambda s: graph({"a": (nn.Dense(2), "b"), "b": (nn.Dense(2), "a")}, outputs="a")),
    "unknown output": (r"outputs", lambda s: graph({"a": (nn.Dense(2), "input")}, outputs="b")),
    "node without parents": (r"no parents", lambda s: graph({"a": (nn.Dense(2), ())}, outputs="a")),
    "node without a pair": (r"pair", lambda s: graph({"a": nn.Dense(2)}, outputs="a")),
    "bad node name": (r"name", lambda s: graph({"input": (nn.Dense(2), "input")}, outputs="input")),
    "empty stack": (r"at least one", lambda s: stack()),
    "depth zero": (r"L >= 1", lambda s: stack(gru(2), depth=0)),
    "depth of two cells": (r"one cell", lambda s: stack(gru(2), gru(2), depth=2)),
    "depth of a network": (r"\* L", lambda s: stack(stack(gru(2)), depth=2)),
    "depth where the output is wider": (r"'layers'.*shaped", lambda s: Setup(stack(gru(4), depth=2))),
    "a key without draws": (r"deep_eprop draws nothing.*leave out key", lambda s: s.init(key=jax.random.key(0))),
    "joined outputs clash": (r"Node 'b'", lambda s: joined_outputs_clash()),
}

TYPE_ERRORS = {
    "a bound Linen module": (r"bound GRUCell.*unbind", lambda s: Setup(gru(4).bind(s.params[0]))),
    "a bound Linen layer": (r"bound Dense.*unbind", lambda s: stack(nn.Dense(2).bind(s.params[2]))),
    "carry in place of the state": (r"learner.init", lambda s: s.run(state=s.carry)),
    "reset of no state": (r"learner.init", lambda s: s.learner.reset(s.carry, ones(BATCH, dtype=bool))),
    "valid as a list": (r"boolean array", lambda s: s.run(valid=[True] * STEPS)),
    "loss that is no function": (r"loss_fn", lambda s: s.learner.value_and_grad(3.0)),
    "hops not an integer": (r"hops.*1.5", lambda s: deep_eprop(gru(4), hops=1.5)),
    "exact not a bool": (r"exact", lambda s: deep_eprop(gru(4), exact="yes")),
    "not a cell": (r"int", lambda s: deep_eprop(3)),
    "a class": (r"class GRUCell", lambda s: deep_eprop(nn.GRUCell)),
    "a class in a stack": (r"class GRUCell", lambda s: stack(nn.GRUCell, nn.Dense(2))),
    "an NNX class": (r"class GRUCell.*rngs=nnx.Rngs\(0\)", lambda s: deep_eprop(nnx.GRUCell)),
    "a Linen module as NNX": (r"linen_cell\(module\)", lambda s: nnx_cell(gru(4))),
}

# A leaf that is no array, in every function that takes params.
for name, call in {
    "init": lambda s, bad: s.init(params=bad),
    "step": lambda s, bad: s.step(params=bad),
    "gradient": lambda s, bad: s.gradient(ones(BATCH, 2), params=bad, state=s.step()[0]),
    "value_and_grad": lambda s, bad: s.run(params=bad),
    "plan": lambda s, bad: s.learner.plan(bad, s.carry, s.xs[0]),
    "analyse": lambda s, bad: analyse(s.learner, bad, s.carry, s.xs[0]),
    "compare_to_bptt": lambda s, bad: compare_to_bptt(s.learner, bad, s.carry, s.xs, s.targets, loss_fn),
    "hoisted_bptt": lambda s, bad: hoisted_bptt(s.learner.network)(loss_fn)(bad, s.carry, s.xs, s.targets),
}.items():
    TYPE_ERRORS[f"a word among params in {name}"] = (
        r"params at '2/activation'.*seen str.*closure",
        lambda s, call=call: call(s, (*s.params[:2], {"activation": "tanh"})),
    )
TYPE_ERRORS |= {
    "a function in the carry": (r"carry at '1'.*seen function", lambda s: s.init(carry=(s.carry[0], ones, ()))),
    "words as x": (r"x at.*ndarray of dtype <U1", lambda s: s.step(x=np.array([["a", "b"]]))),
    "objects as xs": (r"xs at.*of dtype object", lambda s: s.run(xs=np.array([[None]]))),
    "a word in the state": (r"state at", lambda s: s.learner.reset(s.state._replace(carry="h"), ones(1, dtype=bool))),
}

CASES = [
    pytest.param(kind, message, call, id=name)
    for kind, cases in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS))
    for name, (message, call) in cases.items()
]


@pytest.mark.parametrize(("kind", "message", "call"), CASES)
def test_bad_input(good, kind, message, call):
    with pytest.raises(kind, match=f"(?s){message}"):
        call(good)


def test_gradient_without_a_step_is_nan_under_jit(good):
    """There the flag has no value at trace time; a NaN cannot be mistaken for a gradient."""
    grads = jax.jit(good.learner.gradient)(good.params, good.state, ones(BATCH, 2))
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_errors_come_at_trace_time(good):
    with pytest.raises(ValueError, match="xs has 4 steps"):
        jax.eval_shape(good.learner.value_and_grad(loss_fn), good.params, good.state, good.xs, ones(5))


def test_good_input_passes(good):
    (loss, state), grads = good.result
    assert isinstance(state, LearnerState)
    assert jnp.isfinite(loss)
    assert jax.tree.structure(grads) == jax.tree.structure(good.params)
    assert linen_cell(nn.Dense(2)).graph is None
    assert analyse(good.learner, good.params, good.carry, good.xs[0]).batch == BATCH
