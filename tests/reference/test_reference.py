"""The references, each against the same thing written out by hand: Python loops and explicit ``stop_gradient``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.reference import bptt, checkpointed_bptt, forward_rtrl, stop_gradient_oracle, truncated_bptt
from tests.small_cells import (
    BATCH,
    STEPS,
    assert_same,
    by_hand,
    complex_pair,
    complex_problem,
    differs,
    problem,
    squared_error,
    tanh_pair,
    two_layers,
    without_keys,
)


@functools.cache
def two_layers_by_bptt():
    network = two_layers()
    arguments = problem(network)
    return network, arguments, jax.jit(bptt(network, squared_error))(*arguments)


def test_bptt_is_the_gradient_of_a_python_loop():
    network, arguments, seen = two_layers_by_bptt()
    assert_same(seen, by_hand(network.apply)(*arguments))


@pytest.mark.parametrize("segment_length", [1, 3, STEPS + 2])
def test_checkpointing_changes_nothing(segment_length):
    network, arguments, wanted = two_layers_by_bptt()
    assert_same(jax.jit(checkpointed_bptt(network, squared_error, segment_length))(*arguments), wanted)


def test_forward_rtrl_equals_bptt():
    network, arguments, wanted = two_layers_by_bptt()
    assert_same(jax.jit(forward_rtrl(network, squared_error))(*arguments), wanted)


@pytest.mark.parametrize("k", [1, 3, STEPS, STEPS + 5])
def test_truncated_bptt_by_hand(k):
    network, arguments, full = two_layers_by_bptt()
    seen = jax.jit(truncated_bptt(network, squared_error, k))(*arguments)
    assert_same(seen, by_hand(network.apply, cut=lambda t: t % k == 0)(*arguments) if k < STEPS else full)
    assert differs(seen, full) == (k < STEPS)


RESETS = np.zeros((STEPS, BATCH), bool)
RESETS[2, 0] = RESETS[0, 1] = RESETS[3, 1] = True
VALID = np.ones((STEPS, BATCH), bool)
VALID[1, 1] = VALID[3, 0] = VALID[3, 1] = VALID[4, 0] = False


@functools.cache
def two_layers_with_resets():
    network = two_layers()
    arguments = problem(network)
    return network, arguments, by_hand(network.apply)(*arguments, RESETS, VALID)


@pytest.mark.parametrize(
    "make",
    [
        bptt,
        lambda network, loss_fn: checkpointed_bptt(network, loss_fn, 3),
        lambda network, loss_fn: truncated_bptt(network, loss_fn, STEPS),
        forward_rtrl,
        lambda network, loss_fn: stop_gradient_oracle(network, loss_fn, [tanh_pair()] * 2, localise=False),
    ],
    ids=["bptt", "checkpointed", "truncated", "forward", "oracle"],
)
def test_resets_and_valid_against_a_loop_over_examples(make):
    network, arguments, wanted = two_layers_with_resets()
    run = jax.jit(make(network, squared_error))
    assert_same(run(*arguments, RESETS, VALID), wanted)
    assert differs(run(*arguments, np.roll(RESETS, 1, axis=0), VALID), wanted)
    assert differs(run(*arguments, RESETS, np.roll(VALID, 1, axis=0)), wanted)


def test_an_invalid_step_keeps_its_value_and_gets_no_cotangent():
    network = two_layers()
    params, carry, xs, targets = problem(network, steps=1)
    run = bptt(network, squared_error)
    (loss, held), grads = run(params, carry, xs, targets, valid=np.zeros((1, BATCH), bool))
    assert_same(loss, run(params, carry, xs, targets)[0][0])
    assert_same(held, carry)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@functools.cache
def complex_with_resets():
    network, arguments = complex_problem()
    result, grads = by_hand(network.apply)(*arguments, RESETS, VALID)
    # jax.grad gives float0 for an integer leaf.
    return result, {**grads, "stride": jnp.zeros_like(arguments[0]["stride"])}


@pytest.mark.parametrize(
    "make",
    [
        bptt,
        lambda network, loss_fn: checkpointed_bptt(network, loss_fn, 3),
        lambda network, loss_fn: truncated_bptt(network, loss_fn, STEPS),
        forward_rtrl,
        # Element-wise in its carry: its units are (Re z_i, Im z_i), so localising changes nothing.
        lambda network, loss_fn: stop_gradient_oracle(network, loss_fn, [complex_pair]),
    ],
    ids=["bptt", "checkpointed", "truncated", "forward", "oracle"],
)
def test_complex_integer_and_key_leaves(make):
    network, arguments = complex_problem()
    seen = jax.jit(make(network, squared_error))(*arguments, RESETS, VALID)
    assert_same(without_keys(seen), without_keys(complex_with_resets()))


def test_bad_arguments_say_what_is_needed():
    network = two_layers()
    with pytest.raises(ValueError, match="k counts steps: needed an integer >= 1, seen 0"):
        truncated_bptt(network, squared_error, 0)
    with pytest.raises(ValueError, match=r"segment_length counts steps: .* seen 2\.5"):
        checkpointed_bptt(network, squared_error, 2.5)
