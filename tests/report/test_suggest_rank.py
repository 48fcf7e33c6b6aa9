"""``suggest_rank``: enough directions, and no more than that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop, suggest_rank
from deepeprop_jax.network.cell import Cell


def rotation(numbers: int, angle: float) -> jax.Array:
    """Of the plane of the first two of them."""
    turn = np.eye(numbers)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return jnp.asarray(turn)


def memory_with_two_directions() -> tuple[Cell, dict, jax.Array]:
    """A linear memory of six numbers; the output shows one, which turns into one other: cotangents fill a plane."""
    turn = rotation(6, 0.7)

    def apply(params, h, x):
        h = 0.9 * turn @ h + x @ params["in"]
        return h, h[0] * params["out"]

    keys = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(keys[0], (3, 6)), "out": jax.random.normal(keys[1], (2,))}
    return Cell(None, apply), params, jnp.zeros((4, 6))


def loss_fn(y, target):
    return jnp.mean((y - target[None]) ** 2)


BATCHES = [(jax.random.normal(jax.random.key(i), (12, 4, 3)), jnp.zeros((12, 2))) for i in range(40)]


def suggested(rank, batches=BATCHES):
    network, params, carry = memory_with_two_directions()
    return suggest_rank(deep_eprop(network, carry_rank=rank), loss_fn, params, carry, batches, segment_length=3)


def test_as_many_directions_as_there_are_and_no_more():
    found = suggested(5)
    assert found.rank == 2 and [one.rank for one in found.measured] == [1, 2]
    assert found.measured[0].error > 0.1 > found.measured[1].error
    assert found.helps and "carry_rank=2 is enough" in str(found)


def test_what_is_not_enough_says_so():
    found = suggested(1)
    assert found.rank is None and "None of these is enough" in str(found)
    flat = found._replace(measured=(found.measured[0], found.measured[0]._replace(rank=2)))
    assert not flat.helps and "do not help" in str(flat)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches has none"):
        suggested(1, [])
