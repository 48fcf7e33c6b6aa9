"""The filtered trace: equal to the general one and to the oracles, smaller, and not taken where it would be wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, analyse, deep_eprop, graph, stack
from deepeprop_jax.cells import alif, indrnn, leaky_readout, leaky_rnn, lif, low_pass
from deepeprop_jax.reference import Pair, bptt, stop_gradient_oracle
from deepeprop_jax.traces import make_plan
from tests.gradients import FLOAT64, assert_same_gradient
from tests.segments.test_segment import STEPS, flags_of

KEY = jax.random.key(1)
DOUBLE = {"param_dtype": jnp.float64}
KAPPA = np.array([0.5, 0.9, 0.5])


def two_constants(params, h, x):
    """A linear memory with two distinct constants for three units, one of its own inputs to each."""
    h = KAPPA * h + 2 * (params["w"] @ x)
    return h, jnp.tanh(h)


MEMORY = Cell(
    lambda key, x: ({"w": jax.random.normal(key, (3, x.shape[1]), x.dtype)}, jnp.zeros((x.shape[0], 3), x.dtype)),
    two_constants,
)


def dense(params, h, x):
    """Without a carry: its parameters reach the filter, and are filtered, directly."""
    return h, jnp.tanh(x @ params["w"] + params["b"])


NETWORKS = {
    "feed-forward": lambda: stack(dense, leaky_readout(3, **DOUBLE)),
    "alif": lambda: stack(alif(4, tau=5.0, tau_adaptation=20.0, threshold=0.5, **DOUBLE), leaky_readout(3, **DOUBLE)),
    "leaky": lambda: stack(leaky_rnn(4, **DOUBLE), low_pass(tau=3.0), lambda w, h, x: (h, x)),
    "independent": lambda: stack(indrnn(4, **DOUBLE), MEMORY),
    "two filters": lambda: graph(
        {
            "low": (lif(4, tau=5.0, threshold=0.5, refractory=2.0, **DOUBLE), "input"),
            "mean": (lambda p, h, x: (h + x, h + x), "low"),
            "out": (leaky_readout(2, **DOUBLE), "low"),
        },
        outputs=("mean", "out"),
    ),
}


def loss_fn(y, target):
    return sum(jnp.sum((jnp.tanh(leaf) - target) ** 2) for leaf in jax.tree.leaves(y))


def made(name):
    network, xs = NETWORKS[name](), jax.random.normal(KEY, (STEPS, 3, 2))
    if name == "leaky":
        params, carry = leaky_rnn(4, **DOUBLE).init(KEY, xs[0])
        return network, (params, {}, ()), (carry + 0.3, carry, ()), xs
    if name == "feed-forward":
        low = {"w": jax.random.normal(KEY, (2, 4)), "b": jnp.ones(4)}
        above, carry = leaky_readout(3, **DOUBLE).init(KEY, jnp.ones((3, 4)))
        return network, (low, above), ((), carry), xs
    if name == "two filters":
        low, carry = lif(4, refractory=2.0, **DOUBLE).init(KEY, xs[0])
        out, _ = leaky_readout(2, **DOUBLE).init(KEY, carry[0])
        return (
            network,
            {"low": low, "mean": (), "out": out},
            {"low": carry, "mean": carry[0], "out": jnp.zeros((3, 2))},
            xs,
        )
    return network, *network.init(KEY, xs[0]), xs


def general(make):
    """What ``make()`` gives where no pair is filtered."""
    kept, make_plan._filtered = make_plan._filtered, lambda *_: {}
    try:
        return make()
    finally:
        make_plan._filtered = kept


def gradients(learner, params, carry, xs, lengths):
    """By length, or "stream" for single steps; and the first trace across nodes that is held."""
    resets, valid = flags_of("random")
    targets, state, found = jnp.zeros(STEPS), learner.init(params, carry, xs[0]), {}
    for length in lengths:
        if length == "stream":

            def step(state, at):
                state, y = learner.step(params, learner.reset(state, at[1]), at[0])
                return state, learner.gradient(params, state, jax.grad(loss_fn)(y, 0.0))

            grads = jax.jit(lambda state: jax.lax.scan(step, state, (xs, resets))[1])(state)
            found[length] = jax.tree.map(lambda leaf: leaf.sum(0), grads)
        else:
            run = jax.jit(learner.value_and_grad(loss_fn, segment_length=length))
            found[length] = run(params, state, xs, targets, resets, valid)[1]
    return found


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("alif", (5, "stream")),
        ("feed-forward", (5,)),
        *(pytest.param(name, (1, 5, STEPS, "stream"), marks=pytest.mark.slow) for name in NETWORKS),
    ],
)
def test_it_equals_the_general_trace(name, lengths):
    network, params, carry, xs = made(name)
    filtered = deep_eprop(network)
    needed = general(lambda: gradients(deep_eprop(network), params, carry, xs, lengths))
    found = gradients(filtered, params, carry, xs, lengths)
    plan = filtered.plan(params, carry, xs[0])
    assert len(plan.filtered) == (2 if name == "two filters" else 1)
    for length in lengths:
        assert_same_gradient(found[length], needed[length], FLOAT64, f"{name}, {length}")


def test_of_units_by_themselves_it_is_exact():
    """With constants of two kinds: two numbers for a parameter, where the general trace has three."""
    network, params, carry, xs = made("independent")
    resets, valid = flags_of("random")
    for options in ({}, {"exact": True}, {"hops": 1}):
        learner = deep_eprop(network, **options)
        state = learner.init(params, carry, xs[0])
        assert [trace.shape for trace in state.traces["1 <- 0"]] == [(3, 2, 4), (3, 2, 8), (3, 2, 4)]
        run = jax.jit(learner.value_and_grad(loss_fn, segment_length=4))
        found = run(params, state, xs, jnp.zeros(STEPS), resets, valid)
        needed = jax.jit(bptt(network, loss_fn))(params, carry, xs, jnp.zeros(STEPS), resets, valid)
        assert_same_gradient(found[1], needed[1], FLOAT64, str(options))
        trace = jax.tree.leaves(found[0][1].traces["1 <- 0"])
        assert sum(leaf.size for leaf in trace) == 3 * 2 * (2 * 4 + 4 + 4)


def recurrent_kernel(params, h, x):
    return (0.9 * h + x @ params["w"] + 0.1 * jnp.roll(h, 1),) * 2


def learnt_constant(params, h, x):
    return (params["k"] * h + x @ params["w"],) * 2


def changing_weights(params, h, x):
    return (0.9 * h + jnp.tanh(x @ params["w"]),) * 2


def three_of_three(params, h, x):
    return (np.array([0.5, 0.7, 0.9]) * h + x @ params["w"],) * 2


@pytest.mark.parametrize("above", [recurrent_kernel, learnt_constant, changing_weights, three_of_three])
def test_it_is_not_taken_where_it_would_be_wrong_or_larger(above):
    below = leaky_rnn(4, **DOUBLE)
    low, carry = below.init(KEY, jnp.ones((3, 2)))
    params = low, {"w": jnp.ones((4, 3)), "k": jnp.full(3, 0.9)}
    learner = deep_eprop(stack(below, above), trainable=lambda p: (True, {"w": True, "k": above is learnt_constant}))
    assert not learner.plan(params, (carry, jnp.zeros((3, 3))), jnp.ones((3, 2))).filtered


def test_an_output_that_mixes_units_is_not_shown_unit_by_unit():
    cell = leaky_rnn(4, **DOUBLE)
    low, carry = cell.init(KEY, jnp.ones((3, 2)))

    def mixed(params, h, x):
        h, y = cell.apply(params, h, x)
        return h, y + jnp.roll(y, 1)

    for below, filtered in ((cell, True), (mixed, False)):
        learner = deep_eprop(stack(below, low_pass()))
        assert bool(learner.plan((low, {}), (carry, carry), jnp.ones((3, 2))).filtered) == filtered
    for below, params, filtered in (
        (lambda w, h, x: (h, x @ w), jnp.ones((2, 4)), True),
        (lambda w, h, x: (h, (x @ w) @ w.T @ w), jnp.ones((2, 4)), False),
        (lambda w, h, x: (h, jnp.outer(x, w).ravel()), jnp.ones(2), False),
    ):
        learner = deep_eprop(stack(below, low_pass()))
        assert bool(learner.plan((params, {}), ((), jnp.ones((3, 4))), jnp.ones((3, 2))).filtered) == filtered


def test_analyse_counts_its_bytes():
    network, params, carry, xs = made("alif")
    report = analyse(network, params, carry, xs[0])
    whole = next(mode for mode in report.modes if mode.hops is None and not mode.exact)
    assert report.nodes[1].filters == (("0", 1),) and "filters node 0: 1 in place of 3" in str(report)
    dense = general(lambda: analyse(network, params, carry, xs[0]))
    assert whole.cost.multiply_adds < next(m for m in dense.modes if m.name == whole.name).cost.multiply_adds
    held = deep_eprop(network).init(params, carry, xs[0])
    assert whole.cost.trace_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(held.traces))


def test_constants_are_numbers_wherever_they_are_made():
    below, (low, carry) = leaky_rnn(4, **DOUBLE), leaky_rnn(4, **DOUBLE).init(KEY, jnp.ones((3, 2)))
    kappa = jnp.full(4, 0.8)
    filters = [
        lambda w, h, x: (jnp.exp(jnp.float64(-0.1)) * h + x @ w,) * 2,
        lambda w, h, x: (jnp.full(4, 0.8, h.dtype) * h + x @ w,) * 2,
        lambda w, h, x: (kappa * h + x @ w,) * 2,
    ]
    for above in filters:
        assert deep_eprop(stack(below, above)).plan((low, jnp.eye(4)), (carry, carry), jnp.ones((3, 2))).filtered


def test_a_constant_may_be_mapped_over():
    """Its numbers are then not known while the network is analysed: the trace is the general one."""
    low, carry = leaky_rnn(4, **DOUBLE).init(KEY, jnp.ones((3, 2)))
    xs, state = jax.random.normal(KEY, (6, 3, 2)), (carry, carry)

    def gradient(kappa):
        learner = deep_eprop(stack(leaky_rnn(4, **DOUBLE), lambda w, h, x: (kappa * h + x @ w,) * 2))
        run = learner.value_and_grad(loss_fn, segment_length=3)
        return run((low, jnp.eye(4)), learner.init((low, jnp.eye(4)), state, xs[0]), xs, jnp.zeros(6))[1]

    both, one = jax.jit(jax.vmap(gradient))(jnp.array([0.5, 0.9])), jax.jit(gradient)(0.9)
    assert_same_gradient(jax.tree.map(lambda leaf: leaf[1], both), one, FLOAT64)


@pytest.mark.slow
def test_it_equals_reverse_mode_with_stop_gradient():
    """An oracle that knows nothing of traces: spiking units with lateral weights below a leaky readout."""
    network, params, carry, xs = made("alif")
    low, top = (vertex.cell for vertex in network.graph.nodes)
    pairs = [
        Pair(lambda p, h, x: low.apply(p, h, x)[0], lambda p, h_t, h_tm1, x: h_t[2]),
        Pair(lambda p, h, x: top.apply(p, h, x)[0], lambda p, h_t, h_tm1, x: h_t),
    ]
    oracle = stop_gradient_oracle(network, loss_fn, pairs)
    resets, valid = flags_of("random")
    needed = jax.jit(oracle)(params, carry, xs, jnp.zeros(STEPS), resets, valid)[1]
    for length in (1, 5, STEPS):
        learner = deep_eprop(network)
        run = jax.jit(learner.value_and_grad(loss_fn, segment_length=length))
        found = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(STEPS), resets, valid)[1]
        assert_same_gradient(found, needed, FLOAT64, str(length))


def test_beside_a_general_trace_there_is_none():
    network = stack(leaky_rnn(4, **DOUBLE), leaky_rnn(4, **DOUBLE), low_pass())
    params, carry = leaky_rnn(4, **DOUBLE).init(KEY, jnp.ones((3, 4)))
    plan = deep_eprop(network).plan((params, params, {}), (carry,) * 3, jnp.ones((3, 4)))
    assert len(plan.pairs) == 3 and not plan.filtered
    cut = deep_eprop(network, signals=("0",)).plan((params, params, {}), (carry,) * 3, jnp.ones((3, 4)))
    assert list(cut.filtered) == [(2, 1)]


def test_own_traces_of_low_rank_have_the_general_trace_above():
    network = stack(leaky_rnn(4, **DOUBLE), low_pass(tau=3.0))
    params, carry = leaky_rnn(4, **DOUBLE).init(KEY, jnp.ones((3, 2)))
    xs, start = jax.random.normal(KEY, (8, 3, 2)), (carry, carry)
    found = []
    for options in ({"rank": 4}, {}):
        learner = deep_eprop(network, **options)
        run = jax.jit(learner.value_and_grad(loss_fn, segment_length=2))
        found.append(run((params, {}), learner.init((params, {}), start, xs[0]), xs, jnp.zeros(8))[1])
    assert_same_gradient(*found, 1e-6)
