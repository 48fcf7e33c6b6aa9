"""On eight virtual devices, in a process of their own: splits of batch and traces, and checkpoints there and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from jax.sharding import SingleDeviceSharding

from deepeprop_jax import data_parallel, deep_eprop
from deepeprop_jax.cells import leaky_rnn
from tests.learner.test_data_parallel import BATCH
from tests.learner.test_parameter_parts import check, device_bytes, even, whole_bytes
from tests.learner.test_sharding import losses

FOLDER = "CHECKPOINTS_OF_EIGHT_DEVICES"
eight = pytest.mark.skipif(len(jax.devices()) != 8, reason="run by test_with_eight_devices")


def training():
    """A learner, its arguments, and all that a run of it holds, by one device: params, optimiser, state, a key."""
    network, arguments = even(leaky_rnn(8), leaky_rnn(4))
    learner, (params, carry, xs, targets, resets, valid) = deep_eprop(network), arguments
    state = jax.jit(learner.init)(params, carry, xs[0])
    run = jax.jit(learner.value_and_grad(losses, segment_length=2))
    (_, state), _ = run(params, state, xs, targets, resets, valid)
    state, _ = jax.jit(learner.step)(params, state, xs[0])  # one that waits
    return learner, arguments, {"params": params, "optimiser": optax.adam(1e-2).init(params), "state": state}


def save(path: Path, tree) -> None:
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: Path, tree, shardings):
    like = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)
    with orbax.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def assert_same_bits(seen, needed) -> None:
    assert jax.tree.structure(seen) == jax.tree.structure(needed)
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(needed), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def test_with_eight_devices(tmp_path):
    """Saved on one device, restored on eight, where training goes on; saved there, restored on one."""
    if len(jax.devices()) == 8:
        pytest.skip("this is that process")
    _, _, held = training()
    save(tmp_path / "one", held)
    here = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TEST_DEVICES": "8", FOLDER: str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    one = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), held)
    assert_same_bits(restore(tmp_path / "eight", held, one), held)


@eight
def test_restored_on_eight_devices():
    if FOLDER not in os.environ:
        pytest.skip("the other process has no checkpoint")
    folder = Path(os.environ[FOLDER])
    learner, (params, carry, xs, targets, resets, valid), held = training()
    mesh = jax.make_mesh((8,), ("data",))
    of = learner.shardings(mesh, params, carry, xs[0])
    everywhere = jax.tree.leaves(of.params)[0]
    shardings = {
        "params": of.params,
        "optimiser": jax.tree.map(lambda _: everywhere, held["optimiser"]),
        "state": of.state,
    }
    restored = restore(folder / "one", held, shardings)
    assert_same_bits(restored, held)
    assert device_bytes(restored["state"].traces) * 8 == whole_bytes(held["state"].traces)
    run = jax.jit(data_parallel(learner, mesh).value_and_grad(losses, segment_length=2))
    (loss, _), _ = run(restored["params"], restored["state"], xs, targets, resets, valid)
    assert jnp.isfinite(loss)
    save(folder / "eight", restored)


@eight
def test_two_by_four():
    network, arguments = even(leaky_rnn(8), leaky_rnn(4))
    state, whole = check(deep_eprop(network), arguments)
    assert device_bytes(state.traces) * 8 == whole_bytes(whole.traces)
    assert jax.tree.leaves(state.traces)[0].addressable_shards[0].data.shape[0] == BATCH // 2
