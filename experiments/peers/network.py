"""What is compared: a network of another library, with its weights, and the same mathematics as cells of this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepeprop_jax import Cell

Gradient = Callable[[jax.Array, jax.Array], tuple[Any, ...]]
"""``gradient(xs, targets) -> grads``, xs (T, batch, units), targets (T, batch, outputs); grads as ``Theirs.params``."""


class Sizes(NamedTuple):
    """Of two recurrent layers, equal but in their weights, and a linear readout; as many inputs as units."""

    units: int = 16
    steps: int = 10
    batch: int = 8
    outputs: int = 4


class Theirs(NamedTuple):
    """A network of theirs.

    Attributes:
      params: its weights, a dictionary for each layer from below, the readout last.
      bptt: the gradient of the summed loss by reverse mode through its own forward pass.
      rules: its forward rules, by name.
      cells: the same mathematics here, on the same ``params``.
    """

    params: tuple[dict[str, Any], ...]
    bptt: Gradient
    rules: dict[str, Gradient]
    cells: tuple[Cell, ...]


def loss_fn(y: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of one step: mean over batch and outputs."""
    return jnp.mean(optax.losses.squared_error(y, target))


def linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x W + b; without b where there is none."""
    return x @ params["weight"] + params.get("bias", 0)
