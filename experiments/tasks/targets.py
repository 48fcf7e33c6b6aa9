"""Targets of a classification asked for at some steps of a sequence, and the losses on one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

LossFn = Callable[[Any, Any], jax.Array]
"""One step's loss: of the batched output and its target."""


class Targets(NamedTuple):
    """The class at every step, and how much each step counts.

    Attributes:
      label: (T, batch) int32; (T, batch, bits) where several bits are asked for at once.
      weight: (T, batch) float32; 0 where nothing is asked.
    """

    label: jax.Array
    weight: jax.Array


def at_last_step(label: jax.Array, length: int) -> Targets:
    """Ask for ``label`` (batch,) at the last of ``length`` steps only."""
    weight = jnp.zeros((length, len(label)), jnp.float32).at[-1].set(1)
    return Targets(jnp.broadcast_to(label, weight.shape), weight)


def cross_entropy(logits: jax.Array, target: Targets) -> jax.Array:
    """Softmax cross-entropy of one step: logits (batch, classes), weighted, mean over the batch."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target.label)
    return jnp.mean(target.weight * losses)


def bit_cross_entropy(logits: jax.Array, target: Targets) -> jax.Array:
    """Binary cross-entropy of one step: logits (batch, bits), mean over the bits, weighted, mean over the batch."""
    losses = optax.sigmoid_binary_cross_entropy(logits, target.label)
    return jnp.mean(target.weight * jnp.mean(losses, axis=-1))
