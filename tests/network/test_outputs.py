"""Losses on hidden states: outputs of any node, and leaves of carries, against BPTT and stop_gradient."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import carry_of, deep_eprop, graph, random_feedback, stack
from deepeprop_jax.cells import leaky_readout, lif
from deepeprop_jax.network.cell import graph_of
from deepeprop_jax.network.outputs import with_outputs
from deepeprop_jax.reference import Pair, bptt, stop_gradient_oracle
from tests.gradients import FLOAT64, assert_same_gradient
from tests.segments.test_segment import STEPS, flags_of
from tests.zoo import problem

KEY = jax.random.key(2)


def loss_fn(y, target):
    """Nothing in it is linear, so that a wrong value is a wrong gradient."""
    hidden = sum(jnp.sum(jnp.tanh(leaf) ** 2 + leaf**3) for leaf in jax.tree.leaves((y["low"], y["cell"])))
    errors = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), y["y"], target["value"])
    return target["weight"] * (sum(jax.tree.leaves(errors)) + 0.3 * hidden)


SHOWN = {
    "stack_3": ({"y": "2", "low": "0", "cell": carry_of("1", 0)}, {1: 0}),
    "stack_3_spiking": ({"y": "2", "low": "0", "cell": carry_of("1", 0)}, {1: 0}),
    "stack_5_recurrent": ({"y": "4", "low": "1", "cell": carry_of("2")}, {2: None}),
    "graph_diamond": ({"y": "top", "low": carry_of("low"), "cell": carry_of("right", 0)}, {0: None, 2: 0}),
}
"""Per problem: what is shown, and of which nodes which leaf of the carry."""
CASES = [
    ("stack_3", {}, (5, "stream")),
    ("graph_diamond", {"exact": True}, (5,)),
    *(
        pytest.param(name, options, lengths, marks=pytest.mark.slow)
        for name, options, lengths in [
            ("stack_3", {"exact": True}, (1, 5, STEPS, "stream")),
            ("stack_3", {"hops": 0}, (1, 5, STEPS, "stream")),
            ("graph_diamond", {}, (1, 5, STEPS, "stream")),
            ("graph_diamond", {"hops": 1}, (1, 5, "stream")),
            ("stack_3_spiking", {}, (1, 5, STEPS, "stream")),
            ("stack_5_recurrent", {"hops": 1}, (1, 5, STEPS, "stream")),
        ]
    ),
]


@pytest.mark.parametrize(("name", "options", "lengths"), CASES)
def test_losses_on_hidden_states(name, options, lengths):
    p, (outputs, leaves), (resets, valid) = problem(name, steps=STEPS), SHOWN[name], flags_of("random")
    network = with_outputs(p.network, outputs)
    parts = {
        v: [str(part) for part in outputs.values() if getattr(part, "node", 0) == graph_of(network).nodes[v].name]
        for v in leaves
    }

    def shown(v, pair):
        def output(params, carry_t, carry_tm1, x):
            part = carry_t if leaves[v] is None else carry_t[leaves[v]]
            return {"output": pair.output(params, carry_t, carry_tm1, x), "carry": {parts[v][0]: part}}

        return Pair(pair.carry, output) if v in leaves else pair

    pairs = [shown(v, pair) for v, pair in enumerate(p.pairs)]
    exact, hops = options.get("exact", False), options.get("hops")
    if exact and hops is None:
        oracle = bptt(network, loss_fn)
    else:
        oracle = stop_gradient_oracle(network, loss_fn, pairs, localise=not exact, hops=hops)
    learner = deep_eprop(network, **options)
    state = learner.init(p.params, p.carry, p.xs[0])
    for length in lengths:
        flags = (resets, None) if length == "stream" else (resets, valid)
        needed = jax.jit(oracle)(p.params, p.carry, p.xs, p.targets, *flags)[1]
        if length == "stream":
            found = by_steps(learner, p, state, resets)
        else:
            run = jax.jit(learner.value_and_grad(loss_fn, segment_length=length))
            found = run(p.params, state, p.xs, p.targets, *flags)[1]
        assert_same_gradient(found, needed, FLOAT64, f"{name}, {length}")


def by_steps(learner, p, state, resets):
    def step(state, at):
        x, target, flags = at
        state, y = learner.step(p.params, learner.reset(state, flags), x)
        return state, learner.gradient(p.params, state, jax.grad(loss_fn)(y, target))

    grads = jax.jit(lambda state: jax.lax.scan(step, state, (p.xs, p.targets, resets))[1])(state)
    return jax.tree.map(lambda leaf: leaf.sum(0), grads)


def test_what_is_shown_is_what_the_network_computes():
    network = stack(lif(3, tau=5.0), leaky_readout(2), outputs=("1", "0", carry_of("0", 0)))
    plain = stack(lif(3, tau=5.0), leaky_readout(2))
    x = jax.random.normal(KEY, (4, 5), jnp.float32)
    params, carry = network.init(KEY, x)
    assert jax.tree.structure((params, carry)) == jax.tree.structure(plain.init(KEY, x))
    apply = jax.vmap(network.apply, (None, 0, 0))
    after, y = apply(params, carry, x)
    needed_after, needed = jax.vmap(plain.apply, (None, 0, 0))(params, carry, x)
    assert set(y) == {"1", "0", "0.0"}
    assert_same_gradient((after, y["1"], y["0"], y["0.0"]), (needed_after, needed, after[0][1], after[0][0]), 1e-12)
    assert stack(lif(3), leaky_readout(2), outputs="0").apply(
        jax.tree.map(jnp.asarray, params), jax.tree.map(lambda a: a[0], carry), x[0]
    )[1].shape == (3,)
    deep = stack(lif(5), depth=2, outputs="layers")
    assert jax.vmap(deep.apply, (None, 0, 0))(*deep.init(KEY, x), x)[1].shape == (4, 5)


def test_what_is_shown_may_be_chosen_again():
    inner = stack(lif(3, tau=5.0), leaky_readout(2), outputs={"y": "1", "v": carry_of("0", 0)})
    x = jax.random.normal(KEY, (4, 5), jnp.float32)
    params, carry = inner.init(KEY, x)
    after, _ = jax.vmap(inner.apply, (None, 0, 0))(params, carry, x)
    outer = stack(inner, outputs={"y": "0/1", "spikes": "0/0", "z": carry_of("0/0", 1)})
    _, y = jax.vmap(outer.apply, (None, 0, 0))((params,), (carry,), x)
    assert jnp.array_equal(y["spikes"], after[0][1]) and jnp.array_equal(y["z"], after[0][1])
    assert y["y"].shape == (4, 2)
    assert random_feedback(KEY, outer, (params,), (carry,), x, nodes=("0/0",), of="y")["0/0"].weights.shape == (2, 3)


@pytest.mark.slow
def test_it_pickles_and_takes_signals():
    network = graph({"low": (lif(3), "input"), "out": (leaky_readout(2), "low")}, outputs=("out", carry_of("low", 0)))
    again = pickle.loads(pickle.dumps(network))
    xs = jax.random.normal(KEY, (6, 4, 5), jnp.float32)
    params, carry = again.init(KEY, xs[0])
    signals = random_feedback(KEY, network, params, carry, xs[0], nodes=("out",), of="out")
    assert signals["out"].weights.shape == (2, 2)
    learner = deep_eprop(again, signals=("out",))
    run = learner.value_and_grad(lambda y, t: jnp.sum(y["out"] ** 2) + jnp.sum(y["low.0"] ** 2), signals=signals)
    _, grads = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(6))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_a_signal_for_a_node_whose_carry_is_shown_is_for_its_output():
    """The loss on the potential counts beside it: as without what is shown, plus the gradient of that loss alone."""
    shown = stack(lif(3, tau=5.0), leaky_readout(2), outputs={"y": "1", "v": carry_of("0", 0)})
    plain = stack(lif(3, tau=5.0), leaky_readout(2))
    xs, zeros = jax.random.normal(KEY, (6, 4, 5), jnp.float32), jnp.zeros(6)
    params, carry = plain.init(KEY, xs[0])
    signals = random_feedback(KEY, shown, params, carry, xs[0], nodes=("0",), of="y")
    again = random_feedback(KEY, plain, params, carry, xs[0], nodes=("0",))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, signals["0"].weights, again["0"].weights))
    of_y, of_v = (lambda y: jnp.sum(y**2)), (lambda v: jnp.sum(jnp.tanh(v)))

    def gradient(network, loss, signals):
        learner = deep_eprop(network, signals=tuple(signals))
        run = learner.value_and_grad(lambda y, target: loss(y), signals=signals)
        return run(params, learner.init(params, carry, xs[0]), xs, zeros)[1]

    both = gradient(shown, lambda y: of_y(y["y"]) + of_v(y["v"]), signals)
    parts = gradient(plain, of_y, again), gradient(shown, lambda y: of_v(y["v"]), {})
    assert_same_gradient(both, jax.tree.map(jnp.add, *parts), 1e-5)


@pytest.mark.parametrize(
    ("outputs", "kind", "message"),
    [
        ("top", ValueError, "unknown node 'top'"),
        (carry_of("top"), ValueError, "unknown node 'top'"),
        (3, TypeError, "outputs must be a node's name"),
        ((), TypeError, "outputs must be a node's name"),
        ({"y": 1}, TypeError, "outputs must be a node's name"),
        (("0", carry_of("0", 5)), ValueError, "whose leaves are"),
        (carry_of("0", 0, 0), ValueError, "whose leaves are"),
        (("0", "0"), ValueError, "two entries of one name"),
    ],
)
def test_mistakes_are_refused(outputs, kind, message):
    with pytest.raises(kind, match=message):
        network = stack(lif(3), leaky_readout(2), outputs=outputs)
        jax.vmap(network.apply, (None, 0, 0))(
            *network.init(KEY, jnp.ones((4, 5), jnp.float32)), jnp.ones((4, 5), jnp.float32)
        )
    with pytest.raises(ValueError, match="Write its layers out"):
        stack(lif(3), depth=2, outputs=carry_of("layers", 0))
    with pytest.raises(TypeError, match="takes a node's name"):
        carry_of(0, 1)
