"""Leaky tanh network with one learnable leak per unit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade


def leaky_rnn(
    features: int, *, time_constants: tuple[float, float] = (1.0, 10.0), param_dtype: Any = jnp.float32
) -> Cell:
    """Leaky tanh RNN: every unit is a low-pass filter with its own learnable time constant.

    a   = sigmoid(leak)
    h_t = (1 - a) ∘ h_{t-1} + a ∘ tanh(x_t W_in + h_{t-1} W_rec + b)        y_t = h_t

    *Units*: one step is the unit of time. Left alone, a unit decays as (1 - a)^t = exp(-t / τ), so a = 1 - exp(-1 / τ),
    and leak = log(exp(1 / τ) - 1).

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_kernel`` (features, features), ``bias`` and
    ``leak`` (features,); carry h (features,).

    *Initialisation*: ``input_kernel`` LeCun normal, ``recurrent_kernel`` orthogonal, ``bias`` 0; τ log-uniform between
    the two ``time_constants``; h = 0.

    Args:
      features: number of units.
      time_constants: smallest and largest initial τ, in steps.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``time_constants`` not positive or not in order.

    Reference: H. Jaeger et al., "Optimization and applications of echo state networks with leaky-integrator neurons",
    Neural Networks 20 (2007); here with one learnable leaking rate per unit.

    >>> cell = leaky_rnn(4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape, params["leak"].shape
    ((3, 4), (4,))
    """
    arguments = dict(locals())
    check_size("features", features)
    shortest, longest = time_constants
    check_positive(shortest_time_constant=shortest)
    if longest < shortest:
        raise ValueError(f"time_constants are (smallest, largest) in steps; seen {time_constants!r}.")

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        input_key, recurrent_key, leak_key = jax.random.split(key, 3)
        shape = (input_size("leaky_rnn", x), features)
        exponent = jax.random.uniform(leak_key, (features,), param_dtype)
        tau = shortest * (longest / shortest) ** exponent
        params = {
            "input_kernel": jax.nn.initializers.lecun_normal()(input_key, shape, param_dtype),
            "recurrent_kernel": jax.nn.initializers.orthogonal()(recurrent_key, (features, features), param_dtype),
            "bias": jnp.zeros((features,), param_dtype),
            "leak": jnp.log(jnp.expm1(1 / tau)),
        }
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jax.nn.sigmoid(params["leak"])
        drive = x_t @ params["input_kernel"] + h_tm1 @ params["recurrent_kernel"] + params["bias"]
        h_t = (1 - a) * h_tm1 + a * jnp.tanh(drive)
        return h_t, h_t

    return remade(Cell(init, apply), leaky_rnn, **arguments)
