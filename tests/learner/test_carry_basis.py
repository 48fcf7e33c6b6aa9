"""A basis learnt online: its moments beside a plain computation, and what it is good for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deepeprop_jax import carry_basis, deep_eprop, with_basis
from deepeprop_jax.learner.balanced_truncation import balanced_truncation
from deepeprop_jax.learner.second_moments import Sketch, Whole, kind_for
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import problem, start

KEY = jax.random.key(3)


def learnt(name: str, rank: int = 2, length: int = 3, updates: int = 1, batch: int = 4, **options):
    p = problem(name, steps=options.pop("steps", 9), batch=batch)
    learner = deep_eprop(p.network, carry_rank=rank)
    basis_learner = carry_basis(learner, p.loss_fn, segment_length=length, **options)
    state = start(learner, p)
    basis = jax.jit(basis_learner.init)(KEY, p.params, p.carry, p.xs[0])
    update = jax.jit(basis_learner.update)
    for i in range(updates):
        basis = update(basis, jax.random.fold_in(KEY, i), p.params, state, p.xs, p.targets)
    return p, learner, state, basis


def cov(rows):
    moments = rows.T @ rows
    return moments / jnp.trace(moments)


@pytest.mark.parametrize("flagged", [False, True])
def test_moments_equal_those_of_jacobians_and_tangents(flagged):
    """One update from nothing: by reverse mode, forward mode and Jacobians of plain functions."""
    p, learner, state, basis = learnt("stack_2", updates=0, steps=11)  # the last segment has two steps
    basis_learner = carry_basis(learner, p.loss_fn, segment_length=3, horizons=(0.5, 0.9))
    resets = jnp.zeros((11, 4), bool).at[(4, 7, 9), (0, 1, 0)].set(flagged)
    valid = jnp.ones((11, 4), bool).at[(1, 5, 6, 10), (2, 0, 3, 1)].set(not flagged)
    flags = (resets, valid) if flagged else ()
    basis = basis_learner.init(KEY, p.params, p.carry, p.xs[0])
    basis = jax.jit(basis_learner.update)(basis, jax.random.fold_in(KEY, 0), p.params, state, p.xs, p.targets, *flags)
    plan = learner.plan(p.params, p.carry, p.xs[0])
    numbers, batch, length = plan.projection.numbers, 4, 3
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf[0], p.carry))
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def flat(carry):
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(carry)])

    def segment(params, vector, initial, xs, targets, resets, valid):
        """Of one example: (numbers after the segment, its losses)."""

        def carry_of(vector):
            return tree.unflatten([a.reshape(b.shape) for a, b in zip(jnp.split(vector, cuts), leaves, strict=True)])

        def step(carry, at):
            x, target, reset, active = at
            before = jax.tree.map(lambda a, b: jnp.where(reset, a, b), carry_of(initial), carry)
            after, y = p.network.apply(params, before, x)
            loss = jnp.where(active, p.loss_fn(y, target), 0)
            return jax.tree.map(lambda a, b: jnp.where(active, a, b), after, carry), loss

        carry, losses = lax.scan(step, carry_of(vector), (xs, targets, resets, valid))
        return flat(carry), losses.sum()

    probe_key, pull_key = jax.random.split(jax.random.fold_in(KEY, 0))
    probe = []
    for v, part in enumerate(p.params):
        own, shape = jax.tree.flatten(part)
        keys = jax.random.split(jax.random.fold_in(probe_key, v), max(len(own), 1))
        probe.append(shape.unflatten([jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, own, strict=False)]))
    probe = tuple(probe)
    h = jax.vmap(flat)(p.carry)
    tau, own, pulled, tangents = jnp.zeros_like(h), 0.0, [0.0, 0.0], 0.0
    root = np.eye(numbers) / np.sqrt(2)  # nothing is known yet
    initial, axes = h, (None, 0, 0, 1, {"value": 1, "weight": None}, 1, 1)
    over, jacobians = jax.vmap(segment, axes), jax.vmap(jax.jacrev(segment, 1), axes)
    for i in range(4):
        piece = jax.tree.map(lambda a, i=i: a[i * length : (i + 1) * length], (p.xs, p.targets, resets, valid))
        M, k = jacobians(p.params, h, initial, *piece)
        noise = jax.random.normal(jax.random.fold_in(pull_key, i), h.shape)
        q = jnp.einsum("bnm,bn->bm", M, noise @ root)
        horizon = (np.arange(batch) + i) % 2
        own = own + cov(k)
        pulled = [total + cov(q[horizon == j]) for j, total in enumerate(pulled)]
        if i:
            tangents = tangents + cov(tau - tau.mean(0)[None])
        here = (lambda params, h, at=piece: over(params, h, initial, *at)), (p.params, h), (probe, tau)
        (h, _), (tau, _) = jax.jvp(*here)
    own, tangents = own / jnp.trace(own), tangents / jnp.trace(tangents)
    signals = [(1 - g) * own + g * total / jnp.trace(total) for g, total in zip((0.5, 0.9), pulled, strict=True)]
    assert_same_gradient(basis.signals, jnp.stack(signals), FLOAT64)
    assert_same_gradient(basis.tangents, tangents, FLOAT64)


def test_balanced_truncation_keeps_what_is_large_in_both():
    signals, tangents = jnp.diag(jnp.array([1.0, 4.0, 0.0, 9.0])), jnp.diag(jnp.array([16.0, 1.0, 9.0, 1.0]))
    directions, lift, weights = balanced_truncation(signals, tangents, 2, 1e-12)
    assert jnp.allclose(directions @ lift.T, np.eye(2), atol=1e-6)
    assert jnp.all(jnp.diff(weights) <= 0)
    kept = np.abs(np.asarray(lift)).sum(0) > 1e-3
    assert kept.tolist() == [True, False, False, True]  # 2 has no signal, whatever its tangents are
    # In other coordinates of the carry it is the same projection.
    change, exact = np.random.default_rng(0).normal(size=(4, 4)), balanced_truncation(signals, tangents, 2, 0)
    back = np.linalg.inv(change)
    moved = balanced_truncation(back.T @ signals @ back, change @ tangents @ change.T, 2, 0)
    assert jnp.allclose(moved[1].T @ moved[0], change @ (exact[1].T @ exact[0]) @ back, atol=1e-6)


def error(p, learner, state, length: int) -> float:
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
    grads = run(p.params, state, p.xs, p.targets)[1]
    right = jax.jit(bptt(p.network, p.loss_fn))(p.params, p.carry, p.xs, p.targets)[1]
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True)
    squares = [(jnp.sum(jnp.abs(a - b) ** 2), jnp.sum(jnp.abs(b) ** 2)) for a, b in pairs]
    return float(jnp.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


@pytest.mark.parametrize("name", ["stack_3", "complex_dense", "depth_4"])
def test_a_learnt_basis_is_better_than_a_random_one(name):
    p, learner, state, basis = learnt(name, updates=12, steps=12, batch=8)
    assert error(p, learner, with_basis(state, basis), 3) < 0.8 * error(p, learner, state, 3)


@pytest.mark.parametrize("name", ["custom_vjp_spike", "alif_refractory", "counter_and_key", "derived_leaves"])
def test_cells_of_every_kind_have_a_basis_and_one_example_too(name):
    for batch in (1, 4):
        *_, basis = learnt(name, rank=1, updates=3, batch=batch)
        assert jnp.allclose(basis.directions @ basis.lift.T, np.eye(1), atol=1e-8)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(basis))
        assert jnp.allclose(jnp.trace(basis.signals, axis1=1, axis2=2), 1)


def test_resets_and_valid_steps_are_seen():
    p, learner, state, _ = learnt("linen_gru", updates=0)
    basis_learner = carry_basis(learner, p.loss_fn, segment_length=3)
    basis = basis_learner.init(KEY, p.params, p.carry, p.xs[0])
    update = jax.jit(basis_learner.update)
    resets, valid = jnp.zeros((9, 4), bool), jnp.ones((9, 4), bool)
    plain = update(basis, KEY, p.params, state, p.xs, p.targets, resets, valid)
    with_resets = update(basis, KEY, p.params, state, p.xs, p.targets, resets.at[4].set(True), valid)
    held = update(basis, KEY, p.params, state, p.xs, p.targets, resets, valid.at[4:6].set(False))
    assert_same_gradient(plain, update(basis, KEY, p.params, state, p.xs, p.targets), FLOAT64)
    for other in (with_resets, held):
        assert float(jnp.abs(other.tangents - plain.tangents).max()) > 1e-3


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sequence_in_pieces_shows_what_it_shows_as_a_whole(batch):
    p, learner, state, before = learnt("stack_2", batch=batch, steps=11)
    basis_learner = carry_basis(learner, p.loss_fn, segment_length=3)
    whole = basis_learner.update(before, KEY, p.params, state, p.xs, p.targets)
    key = jax.random.clone(KEY)
    observed = basis_learner.begin(before, key, state.carry)
    observe = jax.jit(basis_learner.observe, donate_argnums=0)  # it shares nothing, with itself or what it was given
    run = learner.value_and_grad(p.loss_fn, segment_length=3)
    for steps in (slice(0, 3), slice(3, 9), slice(9, 11)):
        piece = jax.tree.map(lambda a, steps=steps: a[steps], (p.xs, p.targets))
        observed = observe(observed, p.params, state, *piece)
        (_, state), _ = run(p.params, state, *piece)
    assert observed.boundaries == 4
    assert not key.is_deleted()
    assert_same_gradient(basis_learner.choose(before, observed), whole, FLOAT64)


def test_a_sketch_has_the_moments_in_the_mean():
    rows = np.random.default_rng(0).normal(size=(2, 5, 8)) * np.array([4.0, 2, 1, 1, 0, 1, 1, 3])
    kind = Sketch(4)

    def one(key):
        keys = jax.random.split(key)
        held = kind.mixed(kind.of(keys[0], jnp.asarray(rows[0])), kind.of(keys[1], jnp.asarray(rows[1])), 0.3)
        return held.T @ held

    found = np.asarray(jax.vmap(one)(jax.random.split(KEY, 4000)))
    right = 0.7 * cov(jnp.asarray(rows[0])) + 0.3 * cov(jnp.asarray(rows[1]))
    assert (np.abs(found.mean(0) - right) < 5 * found.std(0) / np.sqrt(len(found)) + 1e-12).all()


@pytest.mark.parametrize("name", ["stack_3", "depth_4"])
def test_a_basis_from_sketches_is_better_than_a_random_one(name):
    p, learner, state, basis = learnt(name, updates=24, steps=12, batch=8, sketch=6, rate=0.1)
    assert basis.tangents.shape[0] == 6
    assert jnp.allclose(basis.directions @ basis.lift.T, np.eye(2), atol=1e-6)
    assert error(p, learner, with_basis(state, basis), 3) < 0.9 * error(p, learner, state, 3)


@pytest.mark.parametrize("sketch", [None, 6])
def test_few_boundaries_of_one_example_give_no_huge_directions(sketch):
    *_, basis = learnt("stack_3", rank=4, steps=6, batch=1, sketch=sketch)
    assert float(jnp.abs(basis.directions).max()) < 1e3
    assert jnp.allclose(basis.directions @ basis.lift.T, np.eye(4), atol=1e-8)


@pytest.mark.parametrize("sketch", [None, 4])
def test_float32_stays_so_where_float64_is_allowed(sketch):
    p = problem("stack_3")
    p = p._replace(**{name: jax.tree.map(float32, getattr(p, name)) for name in ("params", "carry", "xs", "targets")})
    learner = deep_eprop(p.network, carry_rank=2)
    basis_learner = carry_basis(learner, p.loss_fn, segment_length=3, sketch=sketch)
    basis = basis_learner.init(KEY, p.params, p.carry, p.xs[0])
    new = basis_learner.update(basis, KEY, p.params, start(learner, p), p.xs, p.targets)
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(basis)]


def float32(leaf):
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def test_many_numbers_are_sketched_if_nothing_is_said():
    assert isinstance(kind_for(1000, None), Whole)
    assert kind_for(1001, None).shape(1001) == (128, 1001)
    assert isinstance(kind_for(64, 64), Whole)
    with pytest.raises(ValueError, match="give at least 4"):
        learnt("stack_3", rank=4, sketch=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons": (0.5, 1.0)}, "horizons must be"),
        ({"horizons": "ab"}, "horizons must be"),
        ({"rate": 0.0}, "rate <= 1"),
        ({"rate": "a"}, "rate <= 1"),
        ({"segment_length": 0}, "segment_length"),
        ({"sketch": 0}, "sketch must be"),
    ],
)
def test_options_are_checked(options, message):
    p = problem("linen_gru")
    with pytest.raises(ValueError, match=message):
        carry_basis(deep_eprop(p.network, carry_rank=1), p.loss_fn, **({"segment_length": 3} | options))


def test_a_learner_without_a_projected_carry_is_refused():
    p = problem("linen_gru")
    basis_learner = carry_basis(deep_eprop(p.network), p.loss_fn, segment_length=3)
    with pytest.raises(ValueError, match="no projected carry"):
        basis_learner.init(KEY, p.params, p.carry, p.xs[0])


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(("numbers", "rank", "seen"), [(16, 16, 2), (64, 16, 3), (256, 64, 15)])
def test_few_moments_in_float32_give_a_projection_all_the_same(numbers, rank, seen):
    for seed in range(4):
        rows = np.random.default_rng(seed).normal(size=(2, seen, numbers))
        signals, tangents = (jnp.asarray(part.T @ part, jnp.float32) for part in rows)
        directions, lift, _ = balanced_truncation(signals, tangents, rank, 1e-6)
        product = np.asarray(directions, np.float64) @ np.asarray(lift, np.float64).T
        assert np.abs(product - np.eye(rank)).max() < 1e-3


@pytest.mark.mixed_promotion
def test_a_network_without_a_carry_has_a_basis_of_nothing():
    p = problem("graph_feed_forward")
    learner = deep_eprop(p.network, carry_rank=0)
    basis_learner = carry_basis(learner, p.loss_fn, segment_length=3)
    basis = basis_learner.init(KEY, p.params, p.carry, p.xs[0])
    assert basis_learner.update(basis, KEY, p.params, start(learner, p), p.xs, p.targets).updates == 1


def test_what_is_no_learner_and_a_length_of_none_are_refused():
    p = problem("linen_gru")
    with pytest.raises(TypeError, match="what deep_eprop returned"):
        carry_basis(p.network, p.loss_fn, segment_length=3)
    with pytest.raises(TypeError, match="segment_length must be"):
        carry_basis(deep_eprop(p.network, carry_rank=1), p.loss_fn, segment_length=None)
