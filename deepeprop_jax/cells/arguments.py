"""What every constructor in this folder asks of its arguments, and how it makes a carry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def changed(constructor: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those left at their defaults, of which ``jax.nn.relu`` does not pickle."""
    parameters = inspect.signature(constructor).parameters
    return {name: value for name, value in arguments.items() if value is not parameters[name].default}


def check_size(name: str, value: int) -> None:
    """A number of units is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a number of units: needed an integer >= 1, seen {value!r}.")


def check_positive(**values: float) -> None:
    """Time constants and thresholds are above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0; seen {value!r}.")


def input_size(cell: str, x: jax.Array) -> int:
    """Number of inputs of a batch (batch, inputs)."""
    if jnp.ndim(x) != 2:
        raise ValueError(
            f"{cell} takes one vector per example, so init needs x of shape (batch, inputs); seen {jnp.shape(x)}. "
            f"Give one step's batch, without a time axis, and flatten other axes."
        )
    return x.shape[1]


def zeros_carry(x: jax.Array, features: int, param_dtype: DTypeLike) -> jax.Array:
    """A carry leaf of zeros (batch, features), in the dtype that the step computes in."""
    return jnp.zeros((x.shape[0], features), jnp.result_type(x.dtype, param_dtype))
