"""Exact claims need float64; two devices let a test shard; most programs here are compiled once and run once."""

import gc
import os

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", int(os.environ.get("TEST_DEVICES", "2")))
# Programs are made of many small objects that live as long as their test: looking for garbage less often saves a tenth.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Half of XLA's optimisations is half of the suite's time; modules marked ``as_users`` keep them all."""
    quick = request.node.get_closest_marker("as_users") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


BY_THEMSELVES = ("linen_mlp", "stack_3_encoder", "graph_feed_forward")
"""Networks with a Flax LayerNorm, which mixes float32 and float64 by itself."""


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """The library relies on no promotion of dtypes or ranks; tests that do are marked ``mixed_promotion``."""
    given = getattr(request.node, "callspec", None)
    names = [value.split("/")[-1] for value in given.params.values() if isinstance(value, str)] if given else []
    if request.node.get_closest_marker("mixed_promotion") or set(names) & set(BY_THEMSELVES):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
