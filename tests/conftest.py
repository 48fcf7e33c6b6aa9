"""Exact claims need float64; two devices let a test shard; most programs here are compiled once and run once."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)

AS_USERS_COMPILE = {f"test_{name}" for name in ("compiled", "state", "inputs", "float32", "readme", "demo", "wheel")}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Half of XLA's optimisations is half of the suite's time; the modules named above keep them all."""
    quick = request.module.__name__.split(".")[-1] not in AS_USERS_COMPILE
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
