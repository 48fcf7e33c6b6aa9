"""Independently recurrent network: every unit sees only itself in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade


def indrnn(
    features: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    recurrent_max: float = 1.0,
    param_dtype: Any = jnp.float32,
) -> Cell:
    """IndRNN: element-wise in its carry, so deep e-prop is exact for it.

    h_t = activation(x_t W_in + u ∘ h_{t-1} + b)        y_t = h_t

    *Units*: one step is the unit of time.

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_weight`` u and ``bias`` (features,); carry h
    (features,).

    *Initialisation*: ``input_kernel`` LeCun normal; u uniform in [0, ``recurrent_max``]; ``bias`` 0; h = 0. With the
    rectifier the gradient over T steps scales with u^T, so that ``recurrent_max`` = 2^(1/T) keeps it below 2.

    Args:
      features: number of units.
      activation: element-wise function; the rectifier in the paper.
      recurrent_max: largest initial recurrent weight.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1, or ``recurrent_max`` not above 0.

    Reference: S. Li et al., "Independently Recurrent Neural Network (IndRNN)", CVPR 2018, eq. 2.

    >>> cell = indrnn(4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape, params["recurrent_weight"].shape
    ((3, 4), (4,))
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(recurrent_max=recurrent_max)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        input_key, recurrent_key = jax.random.split(key)
        shape = (input_size("indrnn", x), features)
        params = {
            "input_kernel": jax.nn.initializers.lecun_normal()(input_key, shape, param_dtype),
            "recurrent_weight": jax.random.uniform(recurrent_key, (features,), param_dtype, maxval=recurrent_max),
            "bias": jnp.zeros((features,), param_dtype),
        }
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h_t = activation(x_t @ params["input_kernel"] + params["recurrent_weight"] * h_tm1 + params["bias"])
        return h_t, h_t

    return remade(Cell(init, apply), indrnn, **arguments)
