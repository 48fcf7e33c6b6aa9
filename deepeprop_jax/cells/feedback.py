"""A dense layer whose backward weights are its own: feedback alignment from layer to layer."""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import check_size, input_size
from deepeprop_jax.network.cell import Cell, PyTree, remade


class Backward(enum.Enum):
    """What the weights B are that a cotangent goes back through."""

    RANDOM = "random"
    SIGN = "sign"
    LEARNT = "learnt"


def feedback_dense(
    features: int, *, feedback: str = "random", use_bias: bool = True, param_dtype: DTypeLike = jnp.float32
) -> Cell:
    """Dense layer through which the gradient goes back by other weights than those that values go forward by.

        y = x W + b        dL/dx := dL/dy Bᵀ        dL/dW, dL/db as ever

    written as y = sg(x) W + (x - sg(x)) B + b, so that it is so in every mode, also for influences that go up.

    *B*: "random", fixed (T. P. Lillicrap et al., "Random synaptic feedback weights support error backpropagation for
    deep learning", Nature Communications 7, 13276, 2016); "sign", the signs of W times its mean absolute size (Q. Liao,
    J. Z. Leibo, T. Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016); "learnt", with the
    gradient of W, so that with weight decay on both the two become alike (J. F. Kolen, J. B. Pollack, "Backpropagation
    without weight transport", ICNN 1994; M. Akrout et al., "Deep learning without weight transport", NeurIPS 2019).

    *Shapes*: params ``kernel`` W (inputs, features), ``feedback`` B of the same shape unless it is "sign", whose
    gradient is zero where it is "random", and with ``use_bias`` ``bias`` (features,). Carry ().

    *Initialisation*: W and B LeCun normal, drawn apart; b = 0.

    Args:
      features: number of outputs.
      feedback: "random", "sign" or "learnt".
      use_bias: with b.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; another ``feedback``.

    >>> cell = feedback_dense(2)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> {name: leaf.shape for name, leaf in params.items()}
    {'kernel': (5, 2), 'feedback': (5, 2), 'bias': (2,)}
    """
    arguments = dict(locals())
    check_size("features", features)
    kinds = [kind.value for kind in Backward]
    if feedback not in kinds:
        raise ValueError(f"feedback is what B is, one of {', '.join(map(repr, kinds))}; seen {feedback!r}.")
    kind = Backward(feedback)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        shape, draw = (input_size("feedback_dense", x), features), jax.nn.initializers.lecun_normal()
        forward_key, backward_key = jax.random.split(key)
        params = {"kernel": draw(forward_key, shape, param_dtype)}
        if kind is not Backward.SIGN:
            params["feedback"] = draw(backward_key, shape, param_dtype)
        if use_bias:
            params["bias"] = jnp.zeros((features,), param_dtype)
        return params, ()

    def apply(params: PyTree, carry: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        kernel, value = params["kernel"], stop_gradient(x)
        signs = kind is Backward.SIGN
        back = stop_gradient(jnp.sign(kernel) * jnp.abs(kernel).mean()) if signs else params["feedback"]
        y = value @ kernel + (x - value) @ back
        if kind is Backward.LEARNT:
            y = y + value @ (back - stop_gradient(back))
        return carry, y + params["bias"] if use_bias else y

    return remade(Cell(init, apply), feedback_dense, **arguments)
