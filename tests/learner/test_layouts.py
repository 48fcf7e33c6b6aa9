"""Sequences as Flax's RNNs take them: ``time_major=False`` and ``seq_lengths``."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepeprop_jax import data_parallel, deep_eprop, hoisted_bptt, linen_cell
from deepeprop_jax.rules import immediate
from tests.gradients import SAME, assert_same_gradient
from tests.zoo import problem, start

STEPS, BATCH = 7, 3
LENGTHS = jnp.array([7, 2, 5])


def losses(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)


def with_aux(y, target):
    return losses(y, target), {"y": y, "number": jnp.max(y)}


def swapped(tree):
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


class Setup:
    def __init__(self):
        self.p = problem("stack_2", steps=STEPS)
        self.targets = self.p.targets["value"]
        self.resets = jnp.zeros((STEPS, BATCH), bool).at[3, 2].set(True)
        self.valid = jnp.arange(STEPS)[:, None] < LENGTHS[None]


def check(value_and_grad, start_of, **options) -> None:
    """Both orders of axes, flags or lengths: one gradient, and aux in the order of xs."""
    s = Setup()
    plain = value_and_grad(with_aux, has_aux=True, **options)
    batch_first = value_and_grad(with_aux, has_aux=True, time_major=False, **options)

    def both(params, begin):
        needed = plain(params, begin, s.p.xs, s.targets, s.resets, s.valid)
        xs, targets, resets, valid = swapped((s.p.xs, s.targets, s.resets, s.valid))
        others = [plain(params, begin, s.p.xs, s.targets, s.resets, seq_lengths=LENGTHS)]
        others.append(batch_first(params, begin, xs, targets, resets, seq_lengths=LENGTHS))
        others.append(batch_first(params, begin, xs, targets, resets, valid))
        return needed, others

    (((loss, aux), end), grads), others = jax.jit(both)(s.p.params, start_of(s.p))
    assert float(loss) > 0
    for i, (((seen_loss, seen_aux), seen_end), seen) in enumerate(others):
        seen_aux = seen_aux | ({"y": swapped(seen_aux["y"])} if i else {})
        assert_same_gradient((seen, seen_loss, seen_aux), (grads, loss, aux), SAME)
        for a, b in zip(jax.tree.leaves(seen_end), jax.tree.leaves(end), strict=True):
            np.testing.assert_allclose(a, b)


def test_of_a_learner():
    learner = deep_eprop(problem("stack_2").network)
    check(learner.value_and_grad, lambda p: start(learner, p))


@pytest.mark.slow
def test_of_a_window():
    learner = deep_eprop(problem("stack_2").network)
    s = Setup()
    state = start(learner, s.p)

    def loss_fn(ys, targets):  # time comes first, whatever the order of xs
        return (losses(ys, targets) * jnp.arange(1.0, 1 + len(ys))[:, None], ys)

    run = jax.jit(learner.value_and_grad(loss_fn, window=3, has_aux=True))
    ((loss, ys), _), grads = run(s.p.params, state, s.p.xs, s.targets, s.resets, s.valid)
    run = jax.jit(learner.value_and_grad(loss_fn, window=3, has_aux=True, time_major=False))
    arguments = swapped((s.p.xs, s.targets, s.resets))
    ((seen, outputs), _), found = run(s.p.params, state, *arguments, seq_lengths=LENGTHS)
    assert_same_gradient((found, seen, swapped(outputs)), (grads, loss, ys), SAME)


@pytest.mark.slow
def test_of_a_rule_and_of_hoisted_bptt():
    learner = immediate(problem("stack_2").network)
    check(learner.value_and_grad, lambda p: start(learner, p))
    check(hoisted_bptt(problem("stack_2").network), lambda p: p.carry)


@pytest.mark.mixed_promotion
def test_lengths_and_outputs_are_those_of_flax():
    """The carry after ``nn.RNN(..., return_carry=True)`` with seq_lengths, and its outputs up to them."""
    xs = jax.random.normal(jax.random.key(0), (BATCH, STEPS, 2), jnp.float32)
    cell = nn.GRUCell(features=4)
    learner = deep_eprop(linen_cell(cell))
    params, carry = learner.network.init(jax.random.key(1), xs[:, 0])
    rnn = nn.RNN(cell, return_carry=True)
    needed, ys = rnn.apply({"params": {"cell": params["params"]}}, xs, initial_carry=carry, seq_lengths=LENGTHS)
    run = learner.value_and_grad(lambda y, target: (jnp.sum(y), y), has_aux=True, time_major=False)
    state = learner.init(params, carry, xs[:, 0])
    ((_, outputs), end), _ = jax.jit(run)(params, state, xs, jnp.zeros((BATCH, STEPS)), seq_lengths=LENGTHS)
    np.testing.assert_allclose(end.carry, needed, rtol=2e-5, atol=1e-6)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(outputs[b, :length], ys[b, :length], rtol=2e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    s = Setup()
    learner = deep_eprop(s.p.network)
    state = start(learner, s.p)
    xs, targets, valid = swapped((s.p.xs, s.targets, s.valid))

    def run(xs=xs, targets=targets, resets=None, valid=None, time_major=False, loss_fn=losses, aux=False, **given):
        made = learner.value_and_grad(loss_fn, time_major=time_major, has_aux=aux)
        return jax.eval_shape(lambda params: made(params, state, xs, targets, resets, valid, **given), s.p.params)

    with pytest.raises(TypeError, match="time_major must be True or False; seen 0"):
        run(time_major=0)
    with pytest.raises(
        ValueError, match=r"targets at .* has shape \(7,\); with time_major=False all .* of xs \(3, 7\)"
    ):
        run(targets=jnp.zeros(7))
    with pytest.raises(ValueError, match=r"targets at .* \(7, 3, 2\); with time_major=False"):
        run(targets=s.targets)
    with pytest.raises(ValueError, match=r"With time_major=False resets must be a boolean array of shape \(3, 7\)"):
        run(resets=s.resets)
    with pytest.raises(ValueError, match=r"aux at 'c' has shape \(2,\) at every step; .* that of the 3 examples"):
        run(loss_fn=lambda y, t: (losses(y, t), {"c": y.mean(0)}), aux=True)
    with pytest.raises(ValueError, match="Give valid or seq_lengths, not both"):
        run(valid=valid, seq_lengths=LENGTHS)
    for time_major in (False, True):
        arguments = {"xs": s.p.xs, "targets": s.targets} if time_major else {}
        with pytest.raises(
            ValueError, match=r"integers from 0 to 7, the steps of xs, of shape \(3,\); seen int.*\(2,\)"
        ):
            run(seq_lengths=LENGTHS[:2], time_major=time_major, **arguments)
    with pytest.raises(ValueError, match="seen float"):
        run(seq_lengths=LENGTHS.astype(float))
    with pytest.raises(ValueError, match="seen one of 2 and one of 8"):
        run(seq_lengths=LENGTHS.at[0].set(8))
    with pytest.raises(TypeError, match="seen list"):
        run(seq_lengths=[7, 2, 5])
    with pytest.raises(ValueError, match="time_major=False"):  # the batch was given first, and not said to be
        run(xs=xs, targets=targets, time_major=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "jit", "data_parallel"])
def test_of_a_split_batch(way):
    p = problem("stack_2", steps=STEPS, batch=4)
    own, lengths = deep_eprop(p.network), jnp.array([7, 2, 5, 0])
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Explicit,))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    arguments = (p.carry, *swapped((p.xs, p.targets["value"])), lengths)

    def with_y(y, target):  # one per example, as data_parallel needs it
        return losses(y, target), {"y": y}

    def run(params, carry, xs, targets, lengths, learner=own):
        state = learner.init(params, carry, xs[:, 0])
        made = learner.value_and_grad(with_y, has_aux=True, time_major=False)
        ((loss, aux), _), grads = made(params, state, xs, targets, seq_lengths=lengths)
        return loss, aux["y"], grads

    needed = jax.jit(run)(p.params, *arguments)
    if way == "data_parallel":
        parallel = data_parallel(own, mesh)
        seen = jax.jit(functools.partial(run, learner=parallel))(p.params, *arguments)
    else:
        run = jax.jit(run) if way == "jit" else run
        seen = run(jax.device_put(p.params, everywhere), *jax.device_put(arguments, split))
    assert_same_gradient(jax.device_get(seen), needed, SAME)
