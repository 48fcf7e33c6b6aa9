"""Exact claims need float64; two devices let a test shard; most programs here are compiled once and run once."""

import gc

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)
# Programs are made of many small objects that live as long as their test: looking for garbage less often saves a tenth.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Half of XLA's optimisations is half of the suite's time; modules marked ``as_users`` keep them all."""
    quick = request.node.get_closest_marker("as_users") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
