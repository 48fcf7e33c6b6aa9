"""Exact claims need float64; two devices let a test shard."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)
