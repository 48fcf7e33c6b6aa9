"""Learning signals that the user gives, against reverse mode through a network that is cut by hand."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import (
    Feedback,
    analyse,
    carry_basis,
    carry_of,
    deep_eprop,
    graph,
    random_feedback,
    sign_feedback,
    stack,
    symmetric_feedback,
    third_factor,
)
from deepeprop_jax.cells import lif, low_pass
from deepeprop_jax.network.cell import graph_of, select
from deepeprop_jax.reference import Pair, bptt, segment_oracle, stop_gradient_oracle
from tests.gradients import FLOAT64, assert_same_gradient
from tests.segments.test_projected import setup
from tests.segments.test_segment import STEPS, flags_of
from tests.zoo import problem, start

KEY = jax.random.key(5)
CONSTANT = Pair(lambda p, h, x: (), lambda p, h, old, x: jax.tree.map(jax.lax.stop_gradient, x))


def constant(params, carry, x):
    return carry, jax.tree.map(jax.lax.stop_gradient, x)


class Cut:
    """A problem in which other nodes read some through ``stop_gradient``, and the loss is linear in their outputs:
    y(sg(h)) + (h - sg(h)) · s."""

    def __init__(self, p, signals):
        vertices, of = graph_of(p.network).nodes, {v.name: i for i, v in enumerate(graph_of(p.network).nodes)}
        self.vertices, cut = vertices, {of[name] for name in signals}

        def named(wire):
            if isinstance(wire, str):
                return wire
            if isinstance(wire, int):
                return f"c{wire}" if wire in cut else f"n{wire}"
            if isinstance(wire, Mapping):
                return {key: named(part) for key, part in wire.items()}
            return tuple(named(part) for part in wire)

        nodes, pairs = {}, []
        for i, vertex in enumerate(vertices):
            cell = vertex.cell if vertex.depth is None else stack(vertex.cell, depth=vertex.depth)
            nodes[f"n{i}"] = (cell, named(vertex.wire))
            pairs.append(p.pairs[i])
            if i in cut:
                nodes[f"c{i}"] = (constant, f"n{i}")
                pairs.append(CONSTANT)
        output = graph_of(p.network).output
        shown = {key: f"n{i}" for key, i in output.items()} if isinstance(output, Mapping) else f"n{output}"
        last = tuple(shown.values()) if isinstance(shown, dict) else (shown,)
        self.network = graph(nodes, outputs=tuple(dict.fromkeys((*last, *(f"n{i}" for i in sorted(cut))))))
        self.pairs = [pairs[list(nodes).index(v.name.split("/")[0])] for v in graph_of(self.network).nodes]

        def loss_fn(ys, target):
            y = {key: ys[name] for key, name in shown.items()} if isinstance(shown, dict) else ys[shown]
            dy = jax.grad(p.loss_fn)(jax.tree.map(jax.lax.stop_gradient, y), target)
            own = [jnp.sum(ys[f"n{of[name]}"] * jax.lax.stop_gradient(s(dy, target))) for name, s in signals.items()]
            return p.loss_fn(y, target) + sum(own)

        self.loss_fn = loss_fn

    def spread(self, tree):
        """Params or carry of the network, as those of the one that is cut."""
        found = {name: () for name in (v.name for v in graph_of(self.network).nodes) if name[0] == "c"}
        return found | {f"n{i}": select(tree, vertex.path) for i, vertex in enumerate(self.vertices)}


QUICK = [
    ("stack_3", ("0", "1"), {}, (5, "stream")),
    ("graph_diamond", ("left",), {}, (5,)),
]
CASES = [
    ("stack_2", ("0",), {}, (1, 5, STEPS, "stream")),
    ("stack_3", ("0",), {"exact": True}, (1, 5, STEPS, "stream")),
    ("stack_3_spiking", ("0",), {"hops": 0}, (1, 5, STEPS, "stream")),
    ("stack_3", ("1",), {"hops": 1}, (1, 5, "stream")),
    ("graph_diamond", ("left",), {}, (1, STEPS, "stream")),
    ("graph_two_outputs", ("low",), {"exact": True}, (1, 5, STEPS, "stream")),
    ("depth_4_between", ("1",), {}, (1, 5, "stream")),
    ("stack_3", ("1",), {"within": "exact"}, (5,)),
]


@pytest.mark.parametrize(
    ("name", "nodes", "options", "lengths"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_a_given_signal_stands_for_what_would_come_from_above(name, nodes, options, lengths):
    check_signals(name, nodes, dict(options), lengths)


def check_signals(name, nodes, options, lengths):
    p = problem(name, steps=STEPS)
    feedback = random_feedback(KEY, p.network, p.params, p.carry, p.xs[0], nodes=nodes)
    signals = {n: third_factor(f, lambda target: 1 + 0.5 * jnp.arange(3.0)) for n, f in feedback.items()}
    cut = Cut(p, signals)
    within, flags = options.pop("within", "eprop"), flags_of("random")
    exact, hops = options.get("exact", False), options.get("hops")
    if within == "exact":
        oracle = segment_oracle(cut.network, cut.loss_fn, cut.pairs, segment_length=lengths[0])
    else:
        oracle = stop_gradient_oracle(cut.network, cut.loss_fn, cut.pairs, localise=not exact, hops=hops)
    params, carry = cut.spread(p.params), cut.spread(p.carry)
    needed = jax.jit(oracle)(params, carry, p.xs, p.targets, *flags)[1]
    learner = deep_eprop(p.network, signals=nodes, **options)
    for length in lengths:
        if length == "stream":
            needed = jax.jit(oracle)(params, carry, p.xs, p.targets, flags[0])[1]  # single steps are all valid
            found = by_steps(learner, p, signals, flags[0])
        else:
            run = learner.value_and_grad(p.loss_fn, segment_length=length, within_segment=within, signals=signals)
            found = jax.jit(run)(p.params, start(learner, p), p.xs, p.targets, *flags)[1]
        found = cut.spread(found)
        assert_same_gradient(found, {key: needed[key] for key in found}, FLOAT64, f"{name}, {length}")


def by_steps(learner, p, signals, resets):
    def step(state, at):
        x, target, flags = at
        state, y = learner.step(p.params, learner.reset(state, flags), x)
        dy = jax.grad(p.loss_fn)(y, target)
        given = {name: signal(dy, target) for name, signal in signals.items()}
        return state, learner.gradient(p.params, state, dy, given)

    grads = jax.jit(lambda state: jax.lax.scan(step, state, (p.xs, p.targets, resets))[1])(start(learner, p))
    return jax.tree.map(lambda leaf: leaf.sum(0), grads)


def test_beside_a_projected_carry_and_its_basis():
    """With all directions the gradient is that of BPTT through the network that is cut; the moments see the signal."""
    p = problem("stack_3", steps=STEPS)
    signals = random_feedback(KEY, p.network, p.params, p.carry, p.xs[0], nodes=("1",))
    cut, flags = Cut(p, signals), flags_of("random")
    _, learner, _, state = setup(p, None, signals=("1",))
    run = learner.value_and_grad(p.loss_fn, segment_length=4, signals=signals)
    found = cut.spread(jax.jit(run)(p.params, state, p.xs, p.targets, *flags)[1])
    oracle = bptt(cut.network, cut.loss_fn)
    needed = jax.jit(oracle)(cut.spread(p.params), cut.spread(p.carry), p.xs, p.targets, *flags)[1]
    assert_same_gradient(found, {key: needed[key] for key in found}, FLOAT64)
    seen = []
    for size in (1.0, 0.0):
        given = jax.tree.map(lambda leaf, size=size: size * leaf, signals)
        of_basis = carry_basis(learner, p.loss_fn, segment_length=4, signals=given)
        observed = of_basis.begin(of_basis.init(KEY, p.params, p.carry, p.xs[0]), KEY, p.carry)
        seen.append(of_basis.observe(observed, p.params, state, p.xs, p.targets).own)
    below = learner.plan(p.params, p.carry, p.xs[0]).projection.starts[2]  # the numbers of nodes "0" and "1"
    assert jnp.abs(seen[0][:below, :below]).max() > 1e-3 > 1e-12 > jnp.abs(seen[1][:below, :below]).max()


def test_symmetric_feedback_below_a_linear_readout_is_the_instantaneous_signal():
    p = problem("linen_gru", steps=STEPS)
    network = stack(p.network, lambda w, h, x: (h, x @ w))
    params = p.params, 0.5 * jax.random.normal(KEY, (3, 2), jnp.float64)
    carry, targets = (p.carry, ()), jax.random.normal(KEY, (STEPS, 3, 2), jnp.float64)

    def loss_fn(y, target):
        return jnp.sum((jnp.tanh(y) - target) ** 2)

    signals = symmetric_feedback(network, params, carry, p.xs[0])
    assert_same_gradient(signals["0"].weights, params[1].T, FLOAT64)
    signs = sign_feedback(network, params, carry, p.xs[0])["0"].weights
    assert_same_gradient(signs, jnp.sign(params[1].T) * jnp.abs(params[1]).mean(), FLOAT64)
    with_signals, without = deep_eprop(network, signals=("0",)), deep_eprop(network, hops=0)
    state = with_signals.init(params, carry, p.xs[0])
    assert list(state.traces) == ["0 <- 0"]
    found = with_signals.value_and_grad(loss_fn, signals=signals)(params, state, p.xs, targets)
    needed = without.value_and_grad(loss_fn)(params, without.init(params, carry, p.xs[0]), p.xs, targets)
    assert_same_gradient(found[1], needed[1], FLOAT64)


def test_a_gradient_may_be_differentiated_by_the_feedback():
    p = problem("stack_2", steps=4)
    feedback = random_feedback(KEY, p.network, p.params, p.carry, p.xs[0], nodes=("0",))
    learner = deep_eprop(p.network, signals=("0",))
    state = start(learner, p)

    def size(feedback):
        grads = learner.value_and_grad(p.loss_fn, segment_length=2, signals=feedback)(p.params, state, p.xs, p.targets)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads[1]))

    slope = jax.jit(jax.grad(size))(feedback)["0"].weights[0, 0]
    step = jnp.zeros_like(feedback["0"].weights).at[0, 0].set(1e-6)
    sides = [jax.jit(size)({"0": Feedback(feedback["0"].weights + sign * step)}) for sign in (1, -1)]
    assert jnp.allclose(slope, (sides[0] - sides[1]) / 2e-6, rtol=1e-5)


def test_feedback_of_outputs_of_every_kind():
    """What a loss on a node's own output says of it is no way through the network; complex outputs are two numbers."""
    x = jnp.ones((3, 2))
    params, carry = (jnp.ones((2, 4)), jnp.ones((4, 2))), (jnp.zeros((3, 4)), ())
    layers = (lambda w, h, x: (jnp.tanh(x @ w + h),) * 2, lambda w, h, x: (h, x @ w))
    shown = stack(*layers, outputs={"y": "1", "h": "0", "carry": carry_of("0")})
    exact = symmetric_feedback(shown, params, carry, x, nodes=("0",))["0"].weights
    assert exact.shape == (10, 4) and jnp.array_equal(exact, jnp.zeros((10, 4)).at[8:].set(params[1].T))
    hidden = stack(*layers, outputs={"y": "1", "carry": carry_of("0")})
    assert list(random_feedback(KEY, hidden, params, carry, x, of="y")) == ["0"]
    network = stack(layers[0], lambda w, h, x: (h, jax.lax.complex(x @ w, x @ w)))
    feedback = random_feedback(KEY, network, params, carry, x)["0"]
    dy = jnp.full((3, 2), 1 + 2j)
    assert jnp.allclose(feedback(dy), jnp.tile(jnp.array([1.0, 1, -2, -2]) @ feedback.weights, (3, 1)))


def test_feedback_is_made_for_nodes_of_every_kind():
    p = problem("depth_4_between")
    feedback = random_feedback(KEY, p.network, p.params, p.carry, p.xs[0])
    names = [v.name for v in graph_of(p.network).nodes]
    assert list(feedback) == names[:-1]
    assert all(name in symmetric_feedback(p.network, p.params, p.carry, p.xs[0]) for name in feedback)
    scaled = random_feedback(KEY, p.network, p.params, p.carry, p.xs[0], scale=0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(scaled))


def test_a_node_may_show_a_carry_that_has_no_derivative():
    """A PRNG key and a counter beside the carry that a signal is for."""
    p = problem("counter_and_key")
    layers = p.network, lambda w, h, x: (h, x * w)
    network = stack(*layers, outputs={"y": "1", "carry": carry_of("0")})
    params, carry, xs = (p.params, jnp.float64(2.0)), (p.carry, ()), p.xs
    found = []
    for shown in (network, stack(*layers, outputs={"y": "1"})):
        learner = deep_eprop(shown, signals=("0",))
        signals = {"0": lambda dy, target: jnp.ones((3, 3))}
        run = learner.value_and_grad(lambda y, target: jnp.sum(y["y"] ** 2), segment_length=4, signals=signals)
        valid = jnp.ones((len(xs), 3), bool).at[2, 1].set(False)
        found.append(run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(len(xs)), None, valid)[1])
    assert_same_gradient(*found, FLOAT64)


def test_analyse_leaves_out_what_a_signal_cuts():
    p = problem("stack_3")
    whole, cut = (analyse(p.network, p.params, p.carry, p.xs[0], signals=names) for names in ((), ("0",)))
    held = [next(m for m in one.modes if m.hops is None and not m.exact).cost.trace_bytes for one in (whole, cut)]
    state = start(deep_eprop(p.network, signals=("0",)), p)
    assert held[0] > held[1] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.traces))


def mistakes():
    p = problem("stack_3", steps=4)
    feedback = random_feedback(KEY, p.network, p.params, p.carry, p.xs[0], nodes=("0",))
    learner, plain = deep_eprop(p.network, signals=("0",)), deep_eprop(p.network)
    state = start(learner, p)
    stepped, y = learner.step(p.params, state, p.xs[0])

    def run(signals, learner=learner):
        return learner.value_and_grad(p.loss_fn, signals=signals)(p.params, start(learner, p), p.xs, p.targets)

    def gradient(signals):
        return learner.gradient(p.params, stepped, y, signals)

    def feedback_for(network, nodes, carry=p.carry, params=p.params):
        return random_feedback(KEY, network, params, carry, p.xs[0], nodes=nodes)

    dense = stack(lambda w, h, x: (h, x @ w), lambda w, h, x: (jnp.tanh(h * w + x.sum()),) * 2)
    dense_params, dense_carry = (jnp.ones((2, 2)), jnp.ones(2)), ((), jnp.zeros((3, 2)))
    two = stack(lambda p, h, x: (h + x, (h, x)), lambda p, h, x: (h, x[0]))
    return {
        "needed a tuple": (TypeError, "tuple of nodes' names", lambda: deep_eprop(p.network, signals="0")),
        "unknown node": (ValueError, "unknown node 'top'", lambda: start(deep_eprop(p.network, signals=("top",)), p)),
        "twice": (ValueError, "names a node twice", lambda: deep_eprop(p.network, signals=("0", "0"))),
        "none given": (ValueError, "no signal is given for the node '0'", lambda: run(None)),
        "not made for it": (ValueError, "made for signals of no node", lambda: run(feedback, plain)),
        "another node": (ValueError, "signal is given for the node '1'", lambda: run(feedback | {"1": feedback["0"]})),
        "no dict": (TypeError, "must be a dict", lambda: run([feedback["0"]])),
        "an array in value_and_grad": (TypeError, "is a function", lambda: run({"0": jnp.ones((3, 3))})),
        "shape": (ValueError, "The signal of node '0'", lambda: run({"0": lambda dy, target: jnp.ones((3, 99))})),
        "shape in gradient": (ValueError, "needed float64", lambda: gradient({"0": jnp.ones((3, 99))})),
        "structure": (ValueError, "must have the structure", lambda: gradient({"0": (y, y)})),
        "gradient without": (ValueError, "no signal is given", lambda: gradient(None)),
        "rows": (ValueError, "are for 7 outputs", lambda: run({"0": Feedback(jnp.ones((7, 3)))})),
        "no carry": (ValueError, "has no carry", lambda: feedback_for(dense, ("0",), dense_carry, dense_params)),
        "two arrays": (
            ValueError,
            "one real array",
            lambda: feedback_for(two, ("0",), (jnp.ones((3, 2)), ()), ((), ())),
        ),
        "nobody": (ValueError, "none needs feedback", lambda: feedback_for(dense, None, dense_carry, dense_params)),
        "of": (ValueError, "no parts with names", lambda: run({"0": Feedback(jnp.ones((2, 3)), of="y")})),
        "third factor": (ValueError, "one number for each example", lambda: third_factor(feedback["0"], jnp.sum)(y, y)),
    }


def test_mistakes_are_refused_with_a_remedy():
    for mistake, (kind, message, call) in mistakes().items():
        with pytest.raises(kind) as refused:
            call()
        assert message in str(refused.value), (mistake, refused.value)


def test_a_relay_without_a_signal_leaves_the_layer_below_to_its_own():
    """The two layers of docs/neuroscience.md: the lower one's gradient is that of it alone under its own signal."""
    cells = {"low": lif(5, tau=10.0), "low rate": low_pass(tau=20.0)}
    two = graph(
        {
            "low": (cells["low"], "input"),
            "low rate": (cells["low rate"], "low"),
            "relay": (lambda z: z, "low"),
            "high": (lif(4, tau=10.0), "relay"),
            "readout": (low_pass(tau=20.0), "high"),
        },
        outputs={"y": "readout", "low rate": "low rate"},
    )
    xs = 3 * jax.random.bernoulli(KEY, 0.5, (12, 3, 6)).astype(jnp.float32)
    targets = jax.random.normal(jax.random.key(6), (12, 3, 4), jnp.float32)
    params, carry = two.init(jax.random.key(7), xs[0])
    feedback = random_feedback(jax.random.key(8), two, params, carry, xs[0], nodes=("low rate",), of="y")

    def gradient_of_low(relay: dict) -> jax.Array:
        signals = {**feedback, **relay}
        learner = deep_eprop(two, signals=tuple(signals))
        run = learner.value_and_grad(lambda y, t: jnp.sum(y["y"] * t), signals=signals, segment_length=5)
        return jax.jit(run)(params, learner.init(params, carry, xs[0]), xs, targets)[1]["low"]

    alone = deep_eprop(stack(cells["low"], cells["low rate"]))
    both = (params["low"], params["low rate"])
    state = alone.init(both, (carry["low"], carry["low rate"]), xs[0])
    weights = feedback["low rate"].weights
    run = alone.value_and_grad(lambda y, t: jnp.sum(y * (t @ weights)), segment_length=5)
    needed = jax.jit(run)(both, state, xs, targets)[1][0]
    found = gradient_of_low({"relay": lambda dy, target: jnp.zeros((3, 5), jnp.float32)})
    assert float(jnp.abs(needed["input_kernel"]).max()) > 1e-3
    assert_same_gradient(found, needed, 1e-6)
    through = gradient_of_low({})["input_kernel"]
    assert float(jnp.abs(through - needed["input_kernel"]).max() / jnp.abs(needed["input_kernel"]).max()) > 1e-3
