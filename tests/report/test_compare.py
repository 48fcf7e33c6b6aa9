"""``compare_to_bptt`` on learners whose gradient is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import CarryBasis, deep_eprop
from deepeprop_jax.learner.contract import LearnerState
from deepeprop_jax.network.cell import Cell
from deepeprop_jax.reference import bptt
from deepeprop_jax.report.compare import compare_to_bptt
from tests.gradients import FLOAT64
from tests.zoo import problem

pytestmark = pytest.mark.mixed_promotion  # Integer and complex parameters, mixed by the cell itself.

STEPS, BATCH = 4, 3


def fake_learner(network, change):
    """A learner that computes BPTT's gradient, then ``change``s it."""

    def value_and_grad(loss_fn, **options):
        def run(params, state, xs, targets, *flags):
            (loss, carry), grads = bptt(network, loss_fn)(params, state, xs, targets)
            return (loss, LearnerState(carry, {}, None, carry)), change(grads)

        return run

    return SimpleNamespace(network=network, init=lambda params, carry, x: carry, value_and_grad=value_and_grad)


def apply(params, h, x):
    """Integer and complex leaves, and "unused", whose gradient is zero."""
    h = jnp.tanh(h * params["cell"]["decay"] + x @ params["cell"]["w"])
    return h, (h.astype(complex) * params["phase"]).imag + params["shift"] + 0 * params["unused"]


NETWORK = Cell(None, apply)
PARAMS = {
    "cell": {"decay": jnp.full(2, 0.5), "w": jnp.linspace(-1.0, 1.0, 4).reshape(2, 2)},
    "phase": jnp.array([1.0 + 2.0j, -0.5j]),
    "shift": jnp.int32(1),
    "unused": jnp.ones(2),
}
CARRY = jnp.linspace(0.0, 1.0, BATCH * 2).reshape(BATCH, 2)
XS = jax.random.normal(jax.random.key(0), (STEPS, BATCH, 2))
TARGETS = jnp.zeros((STEPS, BATCH, 2))
PATHS = ["cell/decay", "cell/w", "phase", "unused"]


def compare(change):
    learner = fake_learner(NETWORK, change)
    return compare_to_bptt(learner, PARAMS, CARRY, XS, TARGETS, lambda y, target: jnp.sum((y - target) ** 2))


def test_bptt_against_itself():
    seen = compare(lambda grads: grads)
    assert [row.path for row in seen.rows] == PATHS  # the integer leaf has no gradient to compare
    for row in (*seen.rows[:3], seen.total):
        assert row.cosine == pytest.approx(1.0, abs=1e-14)
        assert (row.relative_error, row.norm_ratio) == (0.0, 1.0)
    assert seen.total.norm == pytest.approx(math.sqrt(sum(row.norm**2 for row in seen.rows)))


def test_a_changed_leaf_alone_is_reported():
    def change(grads):
        return {**grads, "phase": -2 * grads["phase"], "cell": {**grads["cell"], "w": 0 * grads["cell"]["w"]}}

    decay, w, phase, unused = compare(change).rows
    assert decay.relative_error == 0.0
    assert math.isnan(w.cosine) and (w.relative_error, w.norm_ratio) == (1.0, 0.0)
    assert (phase.cosine, phase.relative_error, phase.norm_ratio) == pytest.approx((-1.0, 3.0, 2.0))
    assert unused.norm == 0.0 and all(math.isnan(value) for value in unused[1:4])


def test_a_complex_leaf_is_compared_as_real_pairs():
    # A quarter turn in the complex plane is orthogonal in real coordinates: |(i - 1) r| = sqrt(2) |r|.
    phase = compare(lambda grads: {**grads, "phase": 1j * grads["phase"]}).rows[2]
    assert phase.cosine == pytest.approx(0.0, abs=1e-14)
    assert (phase.relative_error, phase.norm_ratio) == pytest.approx((math.sqrt(2), 1.0))


def test_a_gradient_where_bptt_has_none_is_an_infinite_error():
    unused = compare(lambda grads: {**grads, "unused": jnp.ones(2)}).rows[3]
    assert math.isnan(unused.cosine) and unused.relative_error == unused.norm_ratio == math.inf


def test_prints_as_a_table():
    lines = str(compare(lambda grads: grads)).splitlines()
    assert lines[0].split("  ")[0].strip() == "parameter" and len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines[2:6]] == PATHS and lines[-1].split()[0] == "all"
    assert lines[2].split()[1:4] == ["1.0000", "0.00e+00", "1.0000"]
    assert lines[5].split()[1:] == ["-", "-", "-", "0.00e+00"]


def test_a_network_of_one_array_has_a_name():
    network = Cell(None, lambda w, h, x: (w * h + x, w * h))
    seen = compare_to_bptt(
        fake_learner(network, lambda grads: grads), jnp.ones(2), CARRY, XS, TARGETS, lambda y, target: jnp.sum(y**2)
    )
    assert [row.path for row in seen.rows] == ["params"]


def test_a_projected_carry_is_compared_along_the_directions_that_are_given():
    p = problem("stack_2")
    learner = deep_eprop(p.network, carry_rank=3)
    numbers = learner.plan(p.params, p.carry, p.xs[0]).projection.numbers
    learner = deep_eprop(p.network, carry_rank=numbers)
    every = jnp.eye(numbers)
    basis = CarryBasis(every, every, *(None,) * 4)
    arguments = (learner, p.params, p.carry, p.xs, p.targets, p.loss_fn)
    assert compare_to_bptt(*arguments, segment_length=4, basis=basis).total.relative_error < FLOAT64
    none = basis._replace(lift=0 * every)
    assert compare_to_bptt(*arguments, segment_length=4, basis=none).total.relative_error > 1e-2
    assert compare_to_bptt(*arguments, segment_length=len(p.xs), basis=none).total.relative_error < FLOAT64


def test_flags_lengths_windows_and_the_batch_first():
    """What a sequence may be given reaches the learner and BPTT alike: exact=True is BPTT, and another is not."""
    p = problem("linen_lstm", steps=7)
    resets = jnp.zeros((7, BATCH), bool).at[(2, 5), (1, 0)].set(True)
    lengths = jnp.array([7, 4, 5])
    targets = jax.random.normal(jax.random.key(3), (7, BATCH))

    def losses(y, target):
        return (jnp.tanh(y).sum(axis=-1) - target) ** 2

    def returns(ys, targets):  # of a window: its derivative at a step depends on the steps behind it
        return (jnp.cumsum(jnp.tanh(ys).sum(axis=-1)[::-1], axis=0)[::-1] - targets) ** 2

    def against(learner, loss_fn=losses, xs=p.xs, targets=targets, **options):
        return compare_to_bptt(learner, p.params, p.carry, xs, targets, loss_fn, **options).total

    exact, online = deep_eprop(p.network, exact=True), deep_eprop(p.network)
    flags = {"resets": resets, "valid": jnp.arange(7)[:, None] < lengths[None]}
    found = [against(exact, **flags), against(exact, returns, window=3), against(exact, returns, window=3, **flags)]
    assert all(row.relative_error < FLOAT64 for row in found)
    assert len({round(row.norm, 9) for row in (*found, against(online), against(online, returns, window=7))}) == 5
    turned = (jnp.swapaxes(leaf, 0, 1) for leaf in (p.xs, targets))
    by_lengths = against(online, losses, *turned, resets=resets.T, seq_lengths=lengths, time_major=False)
    assert by_lengths[1:] == pytest.approx(against(online, **flags)[1:])
    assert by_lengths.relative_error > 1e-3
    inside = {"within_segment": "exact", "segment_length": 7}
    assert against(online, **inside, **flags).relative_error < FLOAT64
    with pytest.raises(ValueError, match="valid or seq_lengths, not both"):
        against(exact, **flags, seq_lengths=lengths)
    with pytest.raises(ValueError, match="from 0 to 7"):
        against(exact, seq_lengths=jnp.array([99, 1, 1]))
    with pytest.raises(ValueError, match=r"begin with \(batch, time\)"):
        against(exact, xs=jnp.zeros(3), time_major=False)
    with pytest.raises(ValueError, match="empty"):
        against(exact, xs=p.xs[:0], targets=targets[:0])
