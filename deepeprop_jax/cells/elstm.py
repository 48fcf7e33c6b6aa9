"""Element-wise LSTM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import check_size, input_size, zeros_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade


def elstm(features: int, *, param_dtype: DTypeLike = jnp.float32) -> Cell:
    """eLSTM: an LSTM whose gates read their own unit alone; element-wise in its carry, so deep e-prop is exact for it.

        f_t = sigmoid(x_t F + w_f ∘ c_{t-1} + b_f)
        z_t = tanh(x_t Z + w_z ∘ c_{t-1} + b_z)
        c_t = f_t ∘ c_{t-1} + (1 - f_t) ∘ z_t
        o_t = sigmoid(x_t O + c_t W_o + b_o)                                        y_t = o_t ∘ c_t

    The output gate reads every unit of c_t, and nothing of it goes back into the carry. So W_o is a full matrix at no
    cost: it needs no trace, and its gradient is exact too.

    *Shapes*: params ``forget_kernel`` F, ``update_kernel`` Z, ``output_kernel`` O (inputs, features), ``forget_weight``
    w_f, ``update_weight`` w_z (features,), ``output_recurrent_kernel`` W_o (features, features), ``forget_bias``,
    ``update_bias``, ``output_bias`` (features,); carry c (features,).

    *Initialisation*: kernels LeCun normal, O and W_o as one matrix of inputs + features rows; w_f, w_z normal with
    standard deviation 0.1, as in the authors' code; biases 0; c = 0.

    Args:
      features: number of units.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1.

    Reference: K. Irie, A. Gopalakrishnan and J. Schmidhuber, "Exploring the Promise and Limits of Real-Time Recurrent
    Learning", ICLR 2024 (arXiv:2305.19044): the element-wise LSTM; biases as in the authors' code.

    >>> cell = elstm(4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape, params["output_recurrent_kernel"].shape
    ((3, 4), (4, 4))
    """
    arguments = dict(locals())
    check_size("features", features)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        inputs = input_size("elstm", x)
        keys = iter(jax.random.split(key, 5))
        kernel = jax.nn.initializers.lecun_normal()
        params: dict[str, jax.Array] = {}
        for gate in ("forget", "update"):
            params[f"{gate}_kernel"] = kernel(next(keys), (inputs, features), param_dtype)
            params[f"{gate}_weight"] = 0.1 * jax.random.normal(next(keys), (features,), param_dtype)
            params[f"{gate}_bias"] = jnp.zeros((features,), param_dtype)
        output = kernel(next(keys), (inputs + features, features), param_dtype)
        params["output_kernel"], params["output_recurrent_kernel"] = output[:inputs], output[inputs:]
        params["output_bias"] = jnp.zeros((features,), param_dtype)
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, c_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        f_t = jax.nn.sigmoid(x_t @ params["forget_kernel"] + params["forget_weight"] * c_tm1 + params["forget_bias"])
        z_t = jnp.tanh(x_t @ params["update_kernel"] + params["update_weight"] * c_tm1 + params["update_bias"])
        c_t = f_t * c_tm1 + (1 - f_t) * z_t
        o_t = jax.nn.sigmoid(
            x_t @ params["output_kernel"] + c_t @ params["output_recurrent_kernel"] + params["output_bias"]
        )
        return c_t, o_t * c_t

    return remade(Cell(init, apply), elstm, **arguments)
