"""What keeps spiking units in their working range: terms that are added to a step's loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def rate_regularisation(rate: jax.Array, target: ArrayLike) -> jax.Array:
    """Draw every unit's firing rate, the mean over the batch, to a target rate.

        E = ½ Σ_j (r_j - f_j)²,  r_j = mean over examples of the rate of unit j

    Give it a running rate, ``low_pass`` behind the spikes, for a loss at every step; or a sum of spikes over the number
    of steps, with a weight in the targets that is 1 at the last step alone, for the rate over a whole sequence.

    Args:
      rate: (batch, units), in spikes per step.
      target: f, a number or (units,), likewise.

    Returns:
      A scalar, in the dtype of the rates' mean.

    Raises:
      ValueError: ``rate`` not (batch, units).

    Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11, 3625 (2020), Methods: firing rate regularization, E_reg = ½ Σ_j (f_j^av - f^target)².

    >>> rate_regularisation(jnp.array([[0.0, 0.3], [0.2, 0.3]]), 0.1).round(3).item()
    0.02
    """
    if rate.ndim != 2:
        raise ValueError(f"rate_regularisation takes rates of shape (batch, units); seen {rate.shape}.")
    mean = rate.mean(0)
    return 0.5 * jnp.sum(jnp.square(mean - jnp.asarray(target, mean.dtype)))


def voltage_regularisation(voltage: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Draw membrane potentials back between -threshold and threshold, where surrogate derivatives are not zero.

        E = ½ mean over examples of Σ_j max(0, v_j - A_j)² + max(0, -v_j - A_j)²

    Args:
      voltage: v, (batch, units): ``carry_of(node, 0)`` of ``lif`` and ``alif``.
      threshold: A, a number or any shape that goes with that of ``voltage``.

    Returns:
      A scalar, in the dtype of ``voltage``.

    Raises:
      ValueError: ``voltage`` not (batch, units).

    The form is this library's own; training code for such networks often has a term like it.

    >>> voltage_regularisation(jnp.array([[0.5, 3.0], [-2.0, 0.0]]), 1.0).item()
    1.25
    """
    if voltage.ndim != 2:
        raise ValueError(f"voltage_regularisation takes potentials of shape (batch, units); seen {voltage.shape}.")
    limit = jnp.asarray(threshold, voltage.dtype)
    outside = jnp.square(jnp.maximum(0, voltage - limit)) + jnp.square(jnp.maximum(0, -voltage - limit))
    return 0.5 * outside.sum(1).mean()
