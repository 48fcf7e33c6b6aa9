"""The state is a plain pytree: saved and restored bit for bit, and sharded over devices along the batch."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepeprop_jax import deep_eprop, stack
from tests.zoo import problem


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


@pytest.mark.mixed_promotion
def test_orbax_restores_the_state_bit_for_bit(tmp_path):
    """A run that is cut in two by a checkpoint ends exactly as one that is not, pending step included."""
    p = problem("stack_3_spiking")
    learner, optimizer = deep_eprop(p.network), optax.adam(1e-2)
    step, gradient = jax.jit(learner.step), jax.jit(learner.gradient)

    @jax.jit
    def update(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def train(everything, times):
        params, opt_state, state = everything
        for t in times:
            x, target = jax.tree.map(lambda leaf, t=t: leaf[t], (p.xs, p.targets))
            state, y = step(params, state, x)
            grads = gradient(params, state, jax.grad(p.loss_fn)(y, target))
            params, opt_state = update(params, opt_state, grads)
        return params, opt_state, state

    start = (p.params, optimizer.init(p.params), learner.init(p.params, p.carry, first(p.xs)))
    half = train(start, range(5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "half", jax.tree.map(ocp.utils.to_shape_dtype_struct, half))
    chex.assert_trees_all_equal(restored, half)
    assert bool(restored[2].pending.active.all())
    chex.assert_trees_all_equal(train(restored, range(5, 9)), train(half, range(5, 9)))


@pytest.mark.parametrize("mode", [{}, {"hops": 0}, {"hops": 0, "rank": 2}], ids=str)
@pytest.mark.parametrize("name", ["stack_3_spiking", "graph_feed_forward"])
def test_no_array_of_the_state_is_without_entries(name, mode):
    """Orbax refuses to save one. Layers without a carry have no traces, nor factors of one."""
    p = problem(name)
    learner = deep_eprop(p.network, **mode)
    state = jax.eval_shape(learner.init, p.params, p.carry, first(p.xs))
    assert min(leaf.size for leaf in jax.tree.leaves(state)) > 0


def test_a_batch_sharded_over_devices_gives_the_same_gradient():
    devices = jax.devices()
    assert len(devices) == 2, "tests/conftest.py asks for two CPU devices"
    mesh = Mesh(devices, ("batch",))
    network = stack(nn.GRUCell(features=5), nn.GRUCell(features=4))
    learner = deep_eprop(network)
    xs = jax.random.normal(jax.random.key(0), (5, 4, 3), jnp.float32)
    params, carry = network.init(jax.random.key(1), xs[0])
    state = learner.init(params, carry, xs[0])
    targets = jnp.zeros((5, 4), jnp.float32)

    def loss_fn(y, target):
        return jnp.mean((y - target[:, None]) ** 2)

    run = jax.jit(learner.value_and_grad(loss_fn))
    needed = run(params, state, xs, targets)
    # The batch is the first axis of every carry and trace of a node without depth; parameters are on all devices.
    everywhere, by_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    placed = jax.tree.map(lambda _: by_batch, state)
    on_all = jax.tree.map(lambda _: everywhere, state.pending.update)
    sharded = jax.device_put(state, placed._replace(pending=placed.pending._replace(update=on_all)))
    by_time_and_batch = NamedSharding(mesh, PartitionSpec(None, "batch"))
    seen = run(jax.device_put(params, everywhere), sharded, *jax.device_put((xs, targets), by_time_and_batch))
    chex.assert_trees_all_close(seen, needed, rtol=1e-4, atol=1e-6)
