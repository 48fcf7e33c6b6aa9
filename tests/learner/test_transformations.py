"""A learner's functions under JAX's transformations: jit, vmap, scan, donation, export, mixed precision."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export

from deepeprop_jax import deep_eprop, stack
from tests.gradients import assert_same_gradient
from tests.learner.test_compiled import NETWORKS, mean_squared_error, setup


def test_jit_does_not_retrace():
    learner, params, _, state, xs, targets = setup(NETWORKS["gru"]())
    run = jax.jit(chex.assert_max_traces(learner.value_and_grad(mean_squared_error), n=1))
    step = jax.jit(chex.assert_max_traces(learner.step, n=1))
    gradient = jax.jit(chex.assert_max_traces(learner.gradient, n=1))
    (_, state), _ = run(params, state, xs, targets)
    (_, state), _ = run(params, state, xs + 1, targets)
    for x in xs:
        state, y = step(params, state, x)
        gradient(params, state, jnp.ones_like(y))
    run(params, state, xs, targets)
    chex.clear_trace_counter()


def test_vmap_over_seeds():
    learner, _, _, _, xs, targets = setup(NETWORKS["gru"]())
    run = learner.value_and_grad(mean_squared_error)

    def of_seed(key):
        params, carry = learner.network.init(key, xs[0])
        (loss, state), grads = run(params, learner.init(params, carry, xs[0]), xs, targets)
        state, y = learner.step(params, state, xs[0])
        return loss, grads, learner.gradient(params, state, jnp.ones_like(y))

    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.jit(jax.vmap(of_seed))(keys)
    for i in range(3):
        one = jax.jit(of_seed)(keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), one, rtol=1e-4, atol=1e-6)


def test_scan_over_steps_equals_the_sequence():
    learner, params, _, state, xs, targets = setup(NETWORKS["gru"](), steps=6)

    def body(loop, inputs):
        state, total = loop
        x, target = inputs
        state, y = learner.step(params, state, x)
        grads = learner.gradient(params, state, jax.grad(mean_squared_error)(y, target))
        return (state, jax.tree.map(jnp.add, total, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (_, total), _ = jax.jit(lambda s: jax.lax.scan(body, (s, zeros), (xs, targets)))(state)
    _, whole = jax.jit(learner.value_and_grad(mean_squared_error))(params, state, xs, targets)
    chex.assert_trees_all_close(total, whole, rtol=1e-4, atol=1e-6)


def test_the_state_can_be_donated_and_takes_nothing_with_it():
    learner, params, carry, state, xs, targets = setup(NETWORKS["gru"]())
    run = jax.jit(learner.value_and_grad(mean_squared_error), donate_argnums=1)
    step = jax.jit(learner.step, donate_argnums=1)
    reset = jax.jit(learner.reset, donate_argnums=0)
    fresh = learner.init(params, carry, xs[0])
    for _ in range(2):
        (_, state), _ = run(params, state, xs, targets)
        for x in xs:
            state, _ = step(params, state, x)
            state = reset(state, jnp.array([True, False, False]))
    # Params, carry and inputs are still there, and a state made by init under jit is its own too.
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((params, carry, xs)))
    made = jax.jit(learner.init)(params, carry, xs[0])
    step(params, made, xs[0])
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((params, carry, xs)))
    chex.assert_trees_all_equal(
        run(params, fresh, xs, targets)[0][0], run(params, learner.init(params, carry, xs[0]), xs, targets)[0][0]
    )


@pytest.mark.parametrize("name", list(NETWORKS))
def test_export_for_cpu_cuda_and_tpu(name):
    learner, params, _, state, xs, targets = setup(NETWORKS[name]())
    dy = jnp.zeros((3, 2), jnp.float32)
    calls = {
        "value_and_grad": (learner.value_and_grad(mean_squared_error), (params, state, xs, targets)),
        "step": (learner.step, (params, state, xs[0])),
        "gradient": (learner.gradient, (params, state, dy)),
    }
    for function, args in calls.values():
        # States are pytrees that jax.export has no serialisation for, so their leaves are the arguments.
        leaves, structure = jax.tree.flatten(args)
        flat = jax.jit(lambda *leaves, f=function, s=structure: jax.tree.leaves(f(*jax.tree.unflatten(s, leaves))))
        exported = export.export(flat, platforms=["cpu", "cuda", "tpu"])(*leaves)
        assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.call(*leaves)[0].shape


@pytest.mark.mixed_promotion
def test_bfloat16_parameters_have_float32_traces():
    # Flax's orthogonal initialiser has no bfloat16.
    gru = functools.partial(nn.GRUCell, features=6, recurrent_kernel_init=nn.initializers.lecun_normal())
    learner = deep_eprop(stack(gru(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), nn.Dense(2)))
    wide = deep_eprop(stack(gru(), nn.Dense(2)))
    xs, targets = jax.random.normal(jax.random.key(1), (4, 3, 4), jnp.bfloat16), jnp.zeros(4, jnp.float32)
    params, carry = learner.network.init(jax.random.key(0), xs[0])
    state = learner.init(params, carry, xs[0])
    (_, state), grads = jax.jit(learner.value_and_grad(mean_squared_error))(params, state, xs, targets)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.traces))
    assert [g.dtype for g in jax.tree.leaves(grads)] == [p.dtype for p in jax.tree.leaves(params)]
    # Close to the float32 network: bfloat16 has 8 bits.
    params, carry, xs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, carry, xs))
    state = wide.init(params, carry, xs[0])
    _, needed = jax.jit(wide.value_and_grad(mean_squared_error))(params, state, xs, targets)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(needed), strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.1 * jnp.linalg.norm(b) + 1e-3


def test_inference_is_apply_under_vmap_and_scan():
    learner, params, carry, state, xs, targets = setup(NETWORKS["gru"]())
    apply = jax.vmap(learner.network.apply, in_axes=(None, 0, 0))
    final, _ = jax.lax.scan(functools.partial(apply, params), carry, xs)
    (_, state), _ = jax.jit(learner.value_and_grad(mean_squared_error))(params, state, xs, targets)
    assert_same_gradient(state.carry, final, 1e-5)
