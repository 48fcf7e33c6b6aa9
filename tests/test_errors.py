"""Bad input: a ValueError or TypeError at trace time that says what was seen, what is needed and what to do."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deepeprop_jax import Cell, analyse, deep_eprop, graph, linen_cell, nnx_cell, stack
from deepeprop_jax.learner import LearnerState

STEPS, BATCH, FEATURES = 4, 3, 2


def loss_fn(y, target):
    return jnp.mean((y - target) ** 2)


class Setup:
    """A learner that works, to be called wrongly."""

    def __init__(self, network=None, **options):
        self.learner = deep_eprop(network or stack(nn.GRUCell(features=4), nn.GRUCell(features=5), nn.Dense(2)), **options)
        self.xs = jnp.ones((STEPS, BATCH, FEATURES), jnp.float32)
        self.params, self.carry = self.learner.network.init(jax.random.key(0), self.xs[0])
        self.state = self.learner.init(self.params, self.carry, self.xs[0])
        self.targets = jnp.zeros(STEPS, jnp.float32)

    def run(self, loss=loss_fn, *, params=None, state=None, xs=None, targets=None, **flags):
        def pick(given, own):
            return own if given is None else given

        run = self.learner.value_and_grad(loss)
        return run(pick(params, self.params), pick(state, self.state), pick(xs, self.xs), pick(targets, self.targets), **flags)


@pytest.fixture(scope="module")
def good():
    return Setup()


def swapped(params):
    return (params[1], params[0], params[2])


def other_setup():
    return Setup(stack(nn.GRUCell(features=3), nn.Dense(2)))


def carry_changes(change):
    def cell(params, carry, x):
        return change(carry), x

    learner = deep_eprop(cell)
    return learner.init((), jnp.zeros((BATCH, 4), jnp.float32), jnp.zeros((BATCH, FEATURES)))


CALLS = {
    "wrong batch size of carry": (
        ValueError, r"batch axis.*carry", lambda s: s.learner.init(s.params, jax.tree.map(lambda l: l[:2], s.carry), s.xs[0])
    ),
    "wrong batch size of x": (ValueError, r"x.*needed", lambda s: s.learner.step(s.params, s.state, s.xs[0, :2])),
    "scalar carry leaf": (ValueError, r"scalar", lambda s: s.learner.init(s.params, (s.carry[0], jnp.zeros(()), ()), s.xs[0])),
    "missing time axis": (ValueError, r"\(time, batch", lambda s: s.run(xs=jnp.ones(3))),
    "one step as a sequence": (ValueError, r"xs has 3 steps", lambda s: s.run(xs=s.xs[0])),
    "empty sequence": (ValueError, r"empty sequence", lambda s: s.run(xs=s.xs[:0], targets=s.targets[:0])),
    "empty batch": (ValueError, r"batch is empty", lambda s: s.learner.init(s.params, jax.tree.map(lambda l: l[:0], s.carry), s.xs[0, :0])),
    "target of the wrong length": (ValueError, r"xs has 4 steps", lambda s: s.run(targets=jnp.zeros(5))),
    "scalar target": (ValueError, r"targets.*first axis", lambda s: s.run(targets=jnp.zeros(()))),
    "missing target": (ValueError, r"targets has no arrays", lambda s: s.run(targets=())),
    "wrong feature size": (ValueError, r"x.*float32\[3, 7\]", lambda s: s.learner.step(s.params, s.state, jnp.ones((BATCH, 7), jnp.float32))),
    "wrong feature size at init": (ValueError, r"Node '0'", lambda s: s.learner.init(s.params, s.carry, jnp.ones((BATCH, 7), jnp.float32))),
    "input of another dtype": (ValueError, r"int32", lambda s: s.learner.step(s.params, s.state, jnp.ones((BATCH, FEATURES), jnp.int32))),
    "carry of another network": (ValueError, r"carry.*tuple of 3", lambda s: s.learner.init(s.params, other_setup().carry, s.xs[0])),
    "params of another network": (ValueError, r"params.*tuple of 3", lambda s: s.learner.init(other_setup().params, s.carry, s.xs[0])),
    "params without the stack's tuple": (ValueError, r"tuple of 3.*dict", lambda s: s.learner.init(s.params[0], s.carry, s.xs[0])),
    "layers swapped": (ValueError, r"Node '0'", lambda s: s.learner.init(swapped(s.params), s.carry, s.xs[0])),
    "layers swapped after init": (ValueError, r"params at", lambda s: s.run(params=swapped(s.params))),
    "state of another network": (ValueError, r"params", lambda s: s.run(state=other_setup().state)),
    "state of another mode": (ValueError, r"traces", lambda s: s.run(state=Setup(exact=True).state)),
    "state of another hops": (ValueError, r"traces", lambda s: s.run(state=Setup(hops=0).state)),
    "carry in place of the state": (TypeError, r"learner.init", lambda s: s.run(state=s.carry)),
    "reset of no state": (TypeError, r"learner.init", lambda s: s.learner.reset(s.carry, jnp.zeros(BATCH, bool))),
    "reset flags of the wrong shape": (ValueError, r"\(3,\)", lambda s: s.learner.reset(s.state, jnp.zeros(2, bool))),
    "resets of the wrong shape": (ValueError, r"\(4, 3\)", lambda s: s.run(resets=jnp.zeros(STEPS, bool))),
    "resets of numbers": (ValueError, r"boolean", lambda s: s.run(resets=jnp.zeros((STEPS, BATCH)))),
    "valid of the wrong shape": (ValueError, r"\(4, 3\)", lambda s: s.run(valid=jnp.zeros((BATCH, STEPS), bool))),
    "valid as a list": (TypeError, r"boolean array", lambda s: s.run(valid=[True] * STEPS)),
    "gradient without a step": (ValueError, r"learner.step first", lambda s: s.learner.gradient(s.params, s.state, jnp.zeros((BATCH, 2)))),
    "gradient after a sequence": (
        ValueError, r"learner.step first", lambda s: s.learner.gradient(s.params, s.run()[0][1], jnp.zeros((BATCH, 2)))
    ),
    "dy of the wrong shape": (
        ValueError, r"dy.*\[3, 2\]", lambda s: s.learner.gradient(s.params, s.learner.step(s.params, s.state, s.xs[0])[0], jnp.zeros((BATCH, 9)))
    ),
    "dy of the wrong structure": (
        ValueError, r"structure", lambda s: s.learner.gradient(s.params, s.learner.step(s.params, s.state, s.xs[0])[0], (jnp.zeros((BATCH, 2)),))
    ),
    "loss that is no scalar": (ValueError, r"scalar", lambda s: s.run(lambda y, t: (y - t) ** 2)),
    "loss of integers": (ValueError, r"scalar", lambda s: s.run(lambda y, t: jnp.zeros((), jnp.int32))),
    "loss with aux unannounced": (ValueError, r"has_aux=True", lambda s: s.run(lambda y, t: (jnp.sum(y), y))),
    "aux missing": (ValueError, r"\(loss, aux\)", lambda s: s.learner.value_and_grad(lambda y, t: jnp.sum(y), has_aux=True)(s.params, s.state, s.xs, s.targets)),
    "loss that is no function": (TypeError, r"loss_fn", lambda s: s.learner.value_and_grad(3.0)),
    "hops negative": (ValueError, r"hops.*-1", lambda s: deep_eprop(nn.GRUCell(features=4), hops=-1)),
    "hops not an integer": (TypeError, r"hops.*1.5", lambda s: deep_eprop(nn.GRUCell(features=4), hops=1.5)),
    "exact not a bool": (TypeError, r"exact", lambda s: deep_eprop(nn.GRUCell(features=4), exact="yes")),
    "trainable of another structure": (ValueError, r"trainable", lambda s: Setup(trainable=(True, False))),
    "trainable without booleans": (ValueError, r"booleans", lambda s: Setup(trainable=(1.0, True, True))),
    "not a cell": (TypeError, r"int", lambda s: deep_eprop(3)),
    "a class": (TypeError, r"class GRUCell", lambda s: deep_eprop(nn.GRUCell)),
    "a class in a stack": (TypeError, r"class GRUCell", lambda s: stack(nn.GRUCell, nn.Dense(2))),
    "an NNX instance": (TypeError, r"nnx_cell\(lambda rngs", lambda s: deep_eprop(nnx.GRUCell(2, 4, rngs=nnx.Rngs(0)))),
    "an NNX instance as factory": (TypeError, r"nnx_cell|factory", lambda s: nnx_cell(nnx.GRUCell(2, 4, rngs=nnx.Rngs(0)))),
    "dropout": (ValueError, r"(?i)dropout", lambda s: Setup(stack(nn.GRUCell(features=4), nn.Dropout(0.5, deterministic=False)))),
    "batch norm": (ValueError, r"BatchNorm|batch_stats", lambda s: Setup(stack(nn.GRUCell(features=4), nn.BatchNorm(use_running_average=False)))),
    "init of a plain function": (ValueError, r"no initialiser", lambda s: deep_eprop(lambda p, h, x: (h, x)).network.init(jax.random.key(0), s.xs[0])),
    "carry changes shape": (ValueError, r"Node 'cell'.*float32\[4\].*float32\[2\]", lambda s: carry_changes(lambda h: h[:2])),
    "carry changes dtype": (ValueError, r"Node 'cell'.*int32", lambda s: carry_changes(lambda h: h.astype(jnp.int32))),
    "carry changes structure": (ValueError, r"Node 'cell'", lambda s: carry_changes(lambda h: (h, h))),
    "cell returns one value": (ValueError, r"\(carry, y\)", lambda s: deep_eprop(lambda p, h, x: h).init((), jnp.zeros((BATCH, 4)), s.xs[0])),
    "unknown parent": (ValueError, r"unknown parent 'c'", lambda s: graph({"a": (nn.Dense(2), "c")}, outputs="a")),
    "cycle": (ValueError, r"cycle", lambda s: graph({"a": (nn.Dense(2), "b"), "b": (nn.Dense(2), "a")}, outputs="a")),
    "unknown output": (ValueError, r"outputs", lambda s: graph({"a": (nn.Dense(2), "input")}, outputs="b")),
    "node without parents": (ValueError, r"no parents", lambda s: graph({"a": (nn.Dense(2), ())}, outputs="a")),
    "node without a pair": (ValueError, r"pair", lambda s: graph({"a": nn.Dense(2)}, outputs="a")),
    "bad node name": (ValueError, r"name", lambda s: graph({"input": (nn.Dense(2), "input")}, outputs="input")),
    "empty stack": (ValueError, r"at least one", lambda s: stack()),
    "depth zero": (ValueError, r"L >= 1", lambda s: stack(nn.GRUCell(features=2), depth=0)),
    "depth of two cells": (ValueError, r"one cell", lambda s: stack(nn.GRUCell(features=2), nn.GRUCell(features=2), depth=2)),
    "depth of a network": (ValueError, r"\* L", lambda s: stack(stack(nn.GRUCell(features=2)), depth=2)),
    "depth where the output is wider": (ValueError, r"'layers'.*shaped", lambda s: Setup(stack(nn.GRUCell(features=4), depth=2))),
    "joined outputs clash": (
        ValueError, r"Node 'b'", lambda s: Setup(graph({"a": (Cell(lambda k, x: ((), ()), lambda p, h, x: (h, {"u": x})), "input"), "b": (nn.Dense(2), ("a", "input"))}, outputs="b"))
    ),
    "reverse-mode through a while loop": (
        ValueError, r"Node 'cell'", lambda s: deep_eprop(
            lambda p, h, x: (jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + p, h), x)
        ).init(jnp.ones(()), jnp.zeros((BATCH, 4)), s.xs[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CALLS))
def test_bad_input(good, case):
    kind, message, call = CALLS[case]
    with pytest.raises(kind, match=f"(?s){message}"):
        call(good)


def test_gradient_without_a_step_is_nan_under_jit(good):
    """There the flag has no value at trace time; a NaN cannot be mistaken for a gradient."""
    grads = jax.jit(good.learner.gradient)(good.params, good.state, jnp.ones((BATCH, 2)))
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_errors_come_at_trace_time(good):
    with pytest.raises(ValueError, match="xs has 4 steps"):
        jax.eval_shape(good.learner.value_and_grad(loss_fn), good.params, good.state, good.xs, jnp.zeros(5))


def test_good_input_passes(good):
    (loss, state), grads = good.run()
    assert isinstance(state, LearnerState)
    assert jnp.isfinite(loss)
    assert jax.tree.structure(grads) == jax.tree.structure(good.params)
    assert linen_cell(nn.Dense(2)).graph is None
    assert analyse(good.learner, good.params, good.carry, good.xs[0]).batch == BATCH
