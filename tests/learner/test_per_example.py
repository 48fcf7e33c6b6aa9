"""``gradient(..., per_example=True)``, and several signals by ``vmap``: each example's part, and each signal's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepeprop_jax import Cell, deep_eprop
from deepeprop_jax.reference import bptt, stop_gradient_oracle
from deepeprop_jax.rules import kf_rtrl, kronecker_sum, rflo, snap, uoro
from tests.gradients import FLOAT64, SAME, assert_same_gradient
from tests.small_cells import complex_problem
from tests.zoo import problem, start

STEPS, BATCH, RESET = 5, 3, (3, 1)


def stream(learner, params, state, xs):
    """The state after all steps, with a reset of one example on the way."""

    def body(state, at):
        x, t = at
        where = (t == RESET[0]) & (jnp.arange(BATCH) == RESET[1])
        return learner.step(params, learner.reset(state, where), x)

    return jax.lax.scan(body, state, (xs, jnp.arange(len(xs))))


def of_example(b, tree):
    """An array's or a cotangent's numbers for one example, zeros for the others."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[b].set(leaf[b]), tree)


def check(learner, params, state, xs, signals=None) -> None:
    """Against the gradient of one example's part of dy at a time: gradients are linear in it."""
    state, ys = jax.jit(lambda state: stream(learner, params, state, xs))(state)
    dy = jax.tree.map(lambda y: jnp.cos(jnp.arange(y[0].size, dtype=y.dtype)).reshape(y[0].shape), ys)
    plain = jax.jit(lambda state, dy, s: learner.gradient(params, state, dy, s))
    parts = [(of_example(b, dy), of_example(b, signals)) for b in range(BATCH)]
    needed = jax.tree.map(lambda *each: np.stack(each), *[plain(state, *part) for part in parts])
    dys, ss = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    @jax.jit
    def seen(state):
        each = learner.gradient(params, state, dy, signals, per_example=True)
        several = jax.vmap(lambda dy, s: learner.gradient(params, state, dy, s))(dys, ss)
        both = jax.vmap(lambda dy, s: learner.gradient(params, state, dy, s, per_example=True))(dys, ss)
        after_reset = learner.reset(state, jnp.arange(BATCH) == 0)
        return each, several, both, learner.gradient(params, after_reset, dy, signals, per_example=True)

    each, several, both, after_reset = seen(state)
    assert_same_gradient(each, needed, SAME, "per example")
    assert_same_gradient(several, needed, SAME, "several signals")
    assert all(any(np.any(leaf[b]) for leaf in jax.tree.leaves(needed)) for b in range(BATCH))
    for leaf, whole in zip(jax.tree.leaves(both), jax.tree.leaves(each), strict=True):
        if leaf.dtype != jax.dtypes.float0:
            for b in range(BATCH):  # each signal is of one example: the others owe nothing to it
                np.testing.assert_allclose(leaf[b], of_example(b, whole), rtol=1e-9, atol=1e-12)
    assert all(not np.any(leaf[0]) for leaf in jax.tree.leaves(after_reset) if leaf.dtype != jax.dtypes.float0)
    assert_same_gradient(*(jax.tree.map(lambda leaf: leaf[1:], tree) for tree in (after_reset, each)), SAME, "reset")


QUICK = [
    ("stack_3_spiking", {"hops": 0}),  # factors wait
    ("stack_2", {"carry_rank": 2, "project_every": 3}),
]
WIDE = [
    ("stack_3", {}),  # influences go up
    ("stack_2", {"rank": 2}),
    ("stack_3", {"exact": True}),
    ("stack_3", {"hops": 0, "rank": 2}),
    ("graph_diamond", {"hops": 1}),
    ("graph_two_outputs", {"exact": True}),
    ("stack_3_spiking", {}),  # a filtered trace
    ("depth_4_between", {}),
    ("depth_4", {"hops": 1}),
    ("depth_4", {"rank": 2, "hops": 0}),
    ("deep_below_deep", {"exact": True}),
    ("deep_below_deep", {"carry_rank": 3}),
    ("stack_3", {"carry_rank": 2, "own_traces": True}),
    ("stack_3", {"carry_rank": 2, "project_every": 2, "carry_factor": 2}),
    ("tower_lru_2", {}),
    ("counter_and_key", {}),
    ("linen_conv_lstm", {}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE)], ids=str
)
def test_each_example_has_its_part(name, options):
    p = problem(name, steps=STEPS)
    learner = deep_eprop(p.network, **options)
    check(learner, p.params, start(learner, p), p.xs)


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({"exact": True}, {"hops": 0}))], ids=str
)
def test_each_example_has_its_part_of_given_signals(options):
    p = problem("stack_2", steps=STEPS)
    learner = deep_eprop(p.network, signals=("0",), **options)
    check(learner, p.params, start(learner, p), p.xs, {"0": jnp.sin(jnp.arange(9.0)).reshape(3, 3)})


def test_complex_and_integer_leaves_and_keys():
    network, (params, carry, xs, _) = complex_problem()
    batch = carry["count"].shape[0]
    keyed = Cell(None, lambda p, h, x: network.apply(p["own"], h, x))
    params = {"own": params, "key": jax.random.key(0)}
    learner = deep_eprop(keyed, trainable={"own": {"decay": True, "b": True, "c": True, "stride": False}, "key": False})
    state, y = jax.jit(lambda x: learner.step(params, learner.init(params, carry, x), x))(xs[0])
    dy = jnp.cos(y)
    gradient = jax.jit(learner.gradient, static_argnames="per_example")
    grads, each = (gradient(params, state, dy, per_example=flag) for flag in (False, True))
    first = gradient(params, state, of_example(0, dy))
    assert each["key"].dtype == jax.dtypes.float0 and each["key"].shape == (batch,)
    assert each["own"]["stride"].dtype == params["own"]["stride"].dtype and not each["own"]["stride"].any()
    for name in ("decay", "b", "c"):
        leaf, whole = each["own"][name], grads["own"][name]
        assert leaf.shape == (batch, *whole.shape) and leaf.dtype == whole.dtype
        np.testing.assert_allclose(leaf.sum(0), whole, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(leaf[0], first["own"][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_examples_stream_gives_the_gradient_of_that_example_alone(exact):
    """Over all steps, against references that know of no traces, run on one example at a time."""
    p = problem("stack_3", steps=STEPS)
    learner = deep_eprop(p.network, exact=exact)
    resets = jnp.zeros((STEPS, BATCH), bool).at[RESET].set(True)

    def body(state, at):
        x, target, reset = at
        state, y = learner.step(p.params, learner.reset(state, reset), x)
        return state, learner.gradient(p.params, state, jax.grad(p.loss_fn)(y, target), per_example=True)

    _, grads = jax.jit(lambda state: jax.lax.scan(body, state, (p.xs, p.targets, resets)))(start(learner, p))
    reference = bptt(p.network, p.loss_fn) if exact else stop_gradient_oracle(p.network, p.loss_fn, p.pairs)
    reference = jax.jit(reference)
    for b in range(BATCH):
        one = slice(b, b + 1)
        carry = jax.tree.map(lambda leaf, one=one: leaf[one], p.carry)
        targets = {"value": p.targets["value"][:, one], "weight": p.targets["weight"]}
        _, needed = reference(p.params, carry, p.xs[:, one], targets, resets[:, one])
        assert_same_gradient(jax.tree.map(lambda leaf, b=b: leaf.sum(0)[b], grads), needed, FLOAT64, f"example {b}")


SPLIT = [("stack_3_spiking", {"hops": 0}), ("depth_4_between", {}), ("stack_2", {"carry_rank": 2, "project_every": 2})]


@pytest.mark.parametrize(
    ("name", "options"),
    [SPLIT[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in (*SPLIT[1:], ("stack_3", {})))],
    ids=str,
)
def test_of_a_split_batch_each_device_has_its_own_examples(name, options):
    p = problem(name, steps=3, batch=8)
    learner = deep_eprop(p.network, **options)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Explicit,))
    places = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",), (None, "data"))]

    def run(params, carry, xs):
        state = learner.init(params, carry, xs[0])
        for x in xs:
            state, y = learner.step(params, state, x)
        dy = jax.tree.map(jnp.cos, y)
        return learner.gradient(params, state, dy, per_example=True)

    moved = [jax.device_put(part, place) for part, place in zip((p.params, p.carry, p.xs), places, strict=True)]
    program = jax.jit(run).lower(*moved).compile()
    seen, needed = program(*moved), jax.jit(run)(p.params, p.carry, p.xs)
    assert_same_gradient(jax.device_get(seen), needed, SAME, name)
    assert all(leaf.sharding.spec[0] == "data" for leaf in jax.tree.leaves(seen))
    assert "all-reduce" not in program.as_text() and "all-gather" not in program.as_text()


RULES = {"uoro": uoro, "kf_rtrl": kf_rtrl, "rflo": rflo}
RULES |= {"snap": lambda network: snap(network, 1), "ok": lambda network: kronecker_sum(network, 2)}


@pytest.mark.parametrize("name", ["uoro", *(pytest.param(n, marks=pytest.mark.slow) for n in RULES if n != "uoro")])
def test_rules_have_parts_of_examples_too(name):
    p = problem("stack_2", steps=STEPS)
    learner = RULES[name](p.network)
    check(learner, p.params, start(learner, p), p.xs)


def test_a_flag_that_is_none_is_refused():
    learner = deep_eprop(lambda p, h, x: (jnp.tanh(p * h + x),) * 2)
    state, y = learner.step(0.5, learner.init(0.5, jnp.zeros((2, 1)), jnp.ones((2, 1))), jnp.ones((2, 1)))
    with pytest.raises(TypeError, match="per_example must be True or False; seen 1"):
        learner.gradient(0.5, state, y, per_example=1)
