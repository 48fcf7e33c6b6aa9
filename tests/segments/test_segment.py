"""Segments of any length give the gradient of the recursion, and leave equal traces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import deep_eprop, hoisted_bptt
from deepeprop_jax.reference import bptt, segment_oracle, stop_gradient_oracle
from deepeprop_jax.segments.through_time import Flags
from tests.gradients import FLOAT64, SAME, assert_same_gradient, relative_errors
from tests.zoo import problem, start

STEPS = 20  # C = 3 gives six segments and a shorter one, C = 8 two and a shorter one
FEW = ["linen_lstm", "lru", "alif_refractory", "gru_reset_before", "stack_3", "depth_4"]


def setup(name: str, exact: bool, hops: int | None, **options):
    p = problem(name, steps=STEPS, **options)
    learner = deep_eprop(p.network, exact=exact, hops=hops)
    return p, learner, start(learner, p)


def flags_of(kind: str) -> Flags:
    """No flags, or random ones, the first and the last step of a segment among them."""
    if kind == "none":
        return Flags(None, None)
    keys = jax.random.split(jax.random.key(0))
    resets = jax.random.bernoulli(keys[0], 0.15, (STEPS, 3)).at[(0, 3, 8, 16), (0, 1, 2, 0)].set(True)
    return Flags(resets, jax.random.bernoulli(keys[1], 0.7, (STEPS, 3)).at[(2, 7, 19), (0, 1, 2)].set(False))


def check_segments(name: str, exact: bool, hops: int | None, lengths: tuple[int, ...], kind: str = "none") -> None:
    """Against reverse mode through stop_gradient, which knows of no traces; those that are left agree."""
    p, learner, state = setup(name, exact, hops)
    flags, ends = flags_of(kind), []
    oracle = stop_gradient_oracle(p.network, p.loss_fn, p.pairs, localise=not exact, hops=hops)
    (loss, carry), grads = jax.jit(oracle)(p.params, p.carry, p.xs, p.targets, flags.resets, flags.valid)
    for length in lengths:
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
        (seen_loss, seen), seen_grads = run(p.params, state, p.xs, p.targets, flags.resets, flags.valid)
        where = f"{name}, exact={exact}, hops={hops}, C={length}"
        assert jnp.allclose(seen_loss, loss, rtol=FLOAT64), where
        assert_same_gradient(seen_grads, grads, FLOAT64, where)
        assert_same_gradient(seen.carry, carry, FLOAT64, where)
        ends.append(seen.traces)
        assert_same_gradient(seen.traces, ends[0], FLOAT64, where)


@pytest.mark.parametrize("name", FEW)
def test_segments_of_any_length(name):
    check_segments(name, False, None, (1, 3))


@pytest.mark.parametrize(("exact", "hops"), [(False, 0), (False, 1), (True, None), (True, 0)])
def test_segments_in_every_mode(exact, hops):
    check_segments("graph_skip", exact, hops, (8,))


@pytest.mark.parametrize(("exact", "hops"), [(False, 0), (True, None), (False, 1), (True, 2)])
def test_a_deep_node_in_every_mode(exact, hops):
    check_segments("depth_4", exact, hops, (8,), "random")


def test_few_hops_across_a_deep_node():
    """Layers of it, and those of the node above, are within the hops for some of the layers below alone."""
    check_segments("deep_below_deep", False, 2, (1, 3))


@pytest.mark.parametrize("name", ["linen_lstm", "counter_and_key", "graph_skip"])
def test_resets_and_valid_at_any_step_of_a_segment(name):
    check_segments(name, False, None, (3,), "random")


def check_exact_inside(name: str, hops: int | None, lengths: tuple[int, ...]) -> None:
    p, learner, state = setup(name, False, hops)
    for length in lengths:
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length, within_segment="exact"))
        oracle = jax.jit(segment_oracle(p.network, p.loss_fn, p.pairs, segment_length=length, hops=hops))
        (loss, _), grads = run(p.params, state, p.xs, p.targets)
        (needed_loss, _), needed = oracle(p.params, p.carry, p.xs, p.targets)
        assert jnp.allclose(loss, needed_loss, rtol=FLOAT64)
        assert_same_gradient(grads, needed, FLOAT64, f"{name}, hops={hops}, C={length}, exact inside")


@pytest.mark.parametrize(
    ("name", "hops"), [("linen_lstm", None), ("graph_skip", 0), ("stack_2", None), ("depth_4", None), ("depth_4", 1)]
)
def test_exact_inside_a_segment_equals_its_oracle(name, hops):
    check_exact_inside(name, hops, (8,))


def test_longer_segments_with_exact_credit_come_closer_to_bptt():
    p, learner, state = setup("graph_skip", False, 0)
    _, needed = jax.jit(bptt(p.network, p.loss_fn))(p.params, p.carry, p.xs, p.targets)

    def error(length: int, within: str) -> float:
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length, within_segment=within))
        return max(relative_errors(run(p.params, state, p.xs, p.targets)[1], needed).values())

    errors = [error(3, "eprop"), error(3, "exact"), error(STEPS, "exact")]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < FLOAT64


@pytest.mark.parametrize("name", ["linen_gru", "stack_2", "counter_and_key", "depth_4_lstm"])
def test_hoisted_bptt_equals_bptt(name):
    p = problem(name, steps=STEPS)
    flags = flags_of("random")
    run, needed = jax.jit(hoisted_bptt(p.network)(p.loss_fn)), jax.jit(bptt(p.network, p.loss_fn))
    for arguments in ((), tuple(flags)):
        (loss, carry), grads = run(p.params, p.carry, p.xs, p.targets, *arguments)
        (loss_bptt, carry_bptt), grads_bptt = needed(p.params, p.carry, p.xs, p.targets, *arguments)
        assert jnp.allclose(loss, loss_bptt, rtol=FLOAT64)
        assert_same_gradient(carry, carry_bptt, FLOAT64, name)
        assert_same_gradient(grads, grads_bptt, FLOAT64, name)


def test_a_stream_of_pieces_in_segments_equals_the_whole():
    p, learner, state = setup("stack_2", False, None)
    run = learner.value_and_grad(p.loss_fn, segment_length=4)
    (loss, whole), grads = jax.jit(run)(p.params, state, p.xs, p.targets)
    total = jax.tree.map(jnp.zeros_like, grads)
    seen_loss = 0.0
    for a, b in ((0, 7), (7, 9), (9, STEPS)):
        xs, targets = jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], (p.xs, p.targets))
        (part_loss, state), part = jax.jit(run)(p.params, state, xs, targets)
        total, seen_loss = jax.tree.map(jnp.add, total, part), seen_loss + part_loss
    assert jnp.allclose(seen_loss, loss, rtol=SAME)
    assert_same_gradient(total, grads, 1e-11)
    assert_same_gradient((state.carry, state.traces), (whole.carry, whole.traces), 1e-11)


def test_aux_of_all_segments_and_the_shorter_last_one_is_stacked():
    p, learner, state = setup("linen_gru", False, None)
    run = learner.value_and_grad(lambda y, target: (p.loss_fn(y, target), y), segment_length=8, has_aux=True)
    ((_, ys), _), _ = jax.jit(run)(p.params, state, p.xs, p.targets)
    apply = jax.vmap(p.network.apply, in_axes=(None, 0, 0))
    _, needed = jax.lax.scan(lambda carry, x: apply(p.params, carry, x), p.carry, p.xs)
    assert jnp.allclose(ys, needed, rtol=SAME)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 0}, "at least 1"),
        ({"segment_length": 2.0}, "integer"),
        ({"within_segment": "bptt"}, "within_segment"),
        ({"within_segment": "exact"}, "needs a segment_length"),
    ],
)
def test_options_are_checked(options, message):
    _, learner, _ = setup("linen_gru", False, None)
    with pytest.raises((ValueError, TypeError), match=message):
        learner.value_and_grad(lambda y, target: y.sum(), **options)
