"""exact=True equals backpropagation through time in float32 as well, compiled as a user compiles it."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests.gradients import FLOAT32
from tests.learner.test_exact import check_equals_bptt
from tests.zoo import cells, margin, networks, problem

pytestmark = pytest.mark.as_users


def check_float32(name: str) -> None:
    # Rounding alone may turn a spike on or off where a membrane is this near to its threshold.
    assert margin(problem(name, jnp.float32)) > 1e-4
    check_equals_bptt(name, FLOAT32, jnp.float32, exact=True)


@pytest.mark.parametrize("name", ["linen_optimized_lstm", "lru", "alif", "graph_skip"])
def test_exact_equals_bptt_in_float32(name):
    check_float32(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cells(), *networks()])
def test_exact_equals_bptt_in_float32_everywhere(name):
    check_float32(name)
