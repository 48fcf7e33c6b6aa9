"""The error meter beside the true error, for gradients of every mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, deep_eprop, error_meter
from deepeprop_jax.reference import bptt
from tests.zoo import problem, start

PROBES = 3000


def true_errors(grads, right, leaves_of) -> tuple[float, list[float]]:
    """‖ĝ - g‖ / ‖g‖ of the whole and of each node."""

    def squares(tree) -> float:
        return sum(float(jnp.sum(jnp.abs(leaf) ** 2)) for leaf in jax.tree.leaves(tree))

    nodes = [
        (squares(jax.tree.map(jnp.subtract, a, b)), squares(b))
        for a, b in zip(leaves_of(grads), leaves_of(right), strict=True)
        if jax.tree.leaves(b)
    ]
    return np.sqrt(sum(a for a, _ in nodes) / sum(b for _, b in nodes)), [np.sqrt(a / b) for a, b in nodes]


def measured(name: str, options: dict, sequences: int, pieces: int = 1, times: int = 1, probes: int = 1, **run_options):
    """(the meter's figures after so many sequences, and after ``times`` as many; the true ones; the meter)."""
    p = problem(name, steps=8)
    learner = deep_eprop(p.network, **options)
    state = start(learner, p)
    run = learner.value_and_grad(p.loss_fn, segment_length=2, **run_options)
    meter_of = error_meter(learner, p.loss_fn, horizon=10**6, probes=probes)
    size = 8 // pieces
    cut = [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], (p.xs, p.targets)) for i in range(pieces)]
    passed, grads = [state], []
    for piece in cut:
        (_, after), found = jax.jit(run)(p.params, passed[-1], *piece)
        passed.append(after)
        grads.append(found)

    def sequence(meter, _):
        meter = meter_of.begin(meter, p.params, p.carry, p.xs[0])
        for before, piece, found in zip(passed, cut, grads, strict=False):
            meter = meter_of.update(meter, p.params, before, *piece, found)
        return meter, None

    meter = meter_of.init(jax.random.key(0), p.params, p.carry, p.xs[0])
    more = jax.jit(lambda meter: jax.lax.scan(sequence, meter, None, sequences)[0])
    meter = more(meter)
    first = meter_of.error(meter)
    for _ in range(times - 1):
        meter = more(meter)
    right = jax.jit(bptt(p.network, p.loss_fn))(p.params, p.carry, p.xs, p.targets)[1]
    total = jax.tree.map(lambda *parts: sum(parts), *grads)
    leaves_of = (lambda tree: list(tree)) if isinstance(p.params, tuple) else (lambda tree: [tree])
    return (first, meter_of.error(meter)), true_errors(total, right, leaves_of), meter


@pytest.mark.parametrize(
    ("name", "options", "run_options"),
    [
        ("stack_2", {}, {}),
        ("stack_2", {"hops": 0}, {"within_segment": "exact"}),
        ("stack_2", {"carry_rank": 1}, {}),
        ("linen_lstm", {"rank": 1}, {}),
        ("complex_dense", {}, {}),
        ("custom_vjp_spike", {}, {}),
        ("counter_and_key", {"hops": 0}, {}),
    ],
)
def test_two_hundred_probes_come_close_and_their_mean_is_the_true_error(name, options, run_options):
    nodes_with_parameters = 2 if name == "stack_2" else 1
    probes = 200 * nodes_with_parameters
    (first, error), (total, nodes), meter = measured(name, options, probes, times=PROBES // probes, **run_options)
    assert len(meter.counts) == nodes_with_parameters and total > 1e-3
    assert abs(float(first.total) / total - 1) < 0.15
    assert abs(float(error.total) - total) < 4 * float(error.uncertainty) < 0.2 * total
    np.testing.assert_allclose(error.nodes, nodes, rtol=0.15, atol=1e-9)


@pytest.mark.parametrize("name", ["stack_2", "lif", "depth_4"])
def test_of_an_exact_gradient_it_reads_zero(name):
    (_, error), _, _ = measured(name, {"exact": True}, 4)
    assert error.total < 1e-12


@pytest.mark.parametrize("probes", [1, 3])
def test_pieces_of_a_stream_go_on_with_their_tangent(probes):
    (_, error), _, _ = measured("stack_2", {"exact": True}, 2, pieces=4, probes=probes)
    assert error.total < 1e-12
    *_, meter = measured("stack_2", {}, 2, pieces=4, probes=probes)
    assert meter.counts.tolist() == [4 * probes, 4 * probes]


@pytest.mark.parametrize(
    "name", ["stack_2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("complex_dense", "counter_and_key"))]
)
def test_several_probes_at_a_time_are_as_many_samples_of_their_nodes(name):
    """Nodes in turn, so that five probes of two nodes leave none behind; each with a ξ and a tangent of its own."""
    nodes = 2 if name == "stack_2" else 1
    (first, error), (total, _), meter = measured(name, {"hops": 0}, 80, times=8, probes=5)
    assert meter.counts.tolist() == [640 * 5 // nodes] * nodes
    assert abs(float(first.total) / total - 1) < 0.15
    assert abs(float(error.total) - total) < 4 * float(error.uncertainty) < 0.2 * total
    numbers = [leaf for leaf in jax.tree.leaves(meter.probe) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert len(np.unique(np.concatenate([np.asarray(leaf).reshape(5, -1) for leaf in numbers], axis=1), axis=0)) == 5


def test_a_running_mean_over_samples_by_hand():
    """Each sample has the weight 1 / n so far, and 1 / horizon at least: of three in one update, together at most 1.

    What those weights leave to chance is the sum of their squares.
    """
    p = problem("linen_lstm", steps=4)
    learner = deep_eprop(p.network)
    state, nothing = start(learner, p), jax.tree.map(jnp.zeros_like, p.params)
    means, weights = {}, {}
    for horizon in (1, 4, 100):
        meter_of = error_meter(learner, p.loss_fn, horizon=horizon, probes=3)
        meter = meter_of.init(jax.random.key(0), p.params, p.carry, p.xs[0])
        read = []
        for _ in range(2):
            before, meter = meter, meter_of.update(meter, p.params, state, p.xs, p.targets, nothing)
            read.append((float(meter.errors[0]), float(meter.squares[0])))
            assert read[-1][0] == pytest.approx(read[-1][1])  # of a gradient of zero all of g · ξ is error
            meter = meter_of.begin(meter, p.params, p.carry, p.xs[0])
            assert not np.array_equal(jax.tree.leaves(before.probe)[0], jax.tree.leaves(meter.probe)[0])
        means[horizon] = [square for _, square in read]
        weights[horizon] = float(meter.squared_weights[0])
    first, mean_of_six = means[100]
    second = 2 * mean_of_six - first
    assert means[1] == pytest.approx([first, second])
    assert means[4] == pytest.approx([first, first + 3 / 4 * (second - first)])
    by_hand = {1: 3 / 3**2, 4: 3 * (1 / 4 * 1 / 3) ** 2 + 3 / 4**2, 100: 6 / 6**2}
    assert weights == pytest.approx(by_hand)


def test_resets_valid_steps_and_masks():
    p = problem("stack_2", steps=8)
    learner = deep_eprop(p.network, exact=True, trainable=(False, True, True)[: len(p.params)])
    state, meter_of = start(learner, p), error_meter(learner, p.loss_fn)
    resets = jnp.zeros((8, 3), bool).at[3, 1].set(True).at[0, 0].set(True)
    valid = jnp.ones((8, 3), bool).at[5:, 2].set(False)
    (_, _), grads = jax.jit(learner.value_and_grad(p.loss_fn))(p.params, state, p.xs, p.targets, resets, valid)
    meter = meter_of.init(jax.random.key(0), p.params, p.carry, p.xs[0])
    assert jax.tree.all(jax.tree.map(lambda leaf: not leaf.any(), meter.probe[0]))
    update = jax.jit(meter_of.update)
    assert meter_of.error(update(meter, p.params, state, p.xs, p.targets, grads, resets, valid)).total < 1e-12
    assert meter_of.error(update(meter, p.params, state, p.xs, p.targets, grads)).total > 1e-3


def test_nothing_seen_is_nan_and_grads_of_another_shape_are_refused():
    p = problem("stack_2", steps=8)
    learner = deep_eprop(p.network)
    meter_of = error_meter(learner, p.loss_fn)
    meter = meter_of.init(jax.random.key(0), p.params, p.carry, p.xs[0])
    assert np.isnan(meter_of.error(meter).total)
    state = start(learner, p)
    with pytest.raises(ValueError, match="grads"):
        meter_of.update(meter, p.params, state, p.xs, p.targets, p.params[0])
    other = error_meter(learner, p.loss_fn, probes=3)
    with pytest.raises(ValueError, match="has 1 probes at a time, this error_meter 3"):
        other.update(meter, p.params, state, p.xs, p.targets, p.params)
    with pytest.raises(ValueError, match="has 1 probes at a time, this error_meter 3"):
        other.begin(meter, p.params, p.carry, p.xs[0])


def test_a_meter_may_be_donated_and_a_gradient_of_nan_is_not_certain():
    p = problem("linen_lstm", steps=4)
    learner = deep_eprop(p.network)
    meter_of, state = error_meter(learner, p.loss_fn, probes=2), start(learner, p)
    meter = meter_of.init(jax.random.key(0), p.params, p.carry, p.xs[0])
    nothing = jax.tree.map(lambda leaf: leaf * jnp.nan, p.params)
    meter = jax.jit(meter_of.update, donate_argnums=0)(meter, p.params, state, p.xs, p.targets, nothing)
    error = meter_of.error(meter)
    assert np.isnan(error.total) and np.isnan(error.uncertainty)


def test_keys_among_the_parameters_nothing_trained_and_bad_options():
    def apply(params, h, x):
        h = jnp.tanh(0.5 * h + x @ params["w"])
        return h, h

    params = {"w": jnp.eye(2), "k": jax.random.key(5)}
    xs, carry = jnp.ones((4, 3, 2)), jnp.zeros((3, 2))
    learner = deep_eprop(Cell(None, apply), exact=True)
    state, meter_of = learner.init(params, carry, xs[0]), error_meter(learner, lambda y, target: y.sum() * target)
    _, grads = learner.value_and_grad(lambda y, target: y.sum() * target)(params, state, xs, jnp.ones(4))
    meter = meter_of.init(jax.random.key(0), params, carry, xs[0])
    assert meter_of.error(meter_of.update(meter, params, state, xs, jnp.ones(4), grads)).total < 1e-12
    frozen = error_meter(deep_eprop(Cell(None, apply), trainable=False), lambda y, target: y.sum())
    with pytest.raises(ValueError, match="No parameter is trained"):
        frozen.init(jax.random.key(0), params, carry, xs[0])
    for number, kind in ((0, ValueError), (None, TypeError)):
        for option in ("horizon", "probes"):
            with pytest.raises(kind, match=f"{option} must be"):
                error_meter(learner, lambda y, target: y.sum(), **{option: number})
