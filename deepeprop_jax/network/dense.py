"""The weights of a dense layer of Flax, whichever Flax it is."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax import nnx

from deepeprop_jax.network.cell import Cell, PyTree, call_of
from deepeprop_jax.network.linen import linen_cell
from deepeprop_jax.network.nnx import NnxStep


def dense_weights(cell: Cell, params: PyTree) -> tuple[jax.Array, jax.Array | None] | None:
    """W (inputs, outputs) and b of a cell that is y = x W + b, ``nn.Dense`` or ``nnx.Linear``; None for any other.

    Raises:
      KeyError, ValueError: params of another cell.
    """
    call, step = call_of(cell), cell.apply
    if call is not None and call.func is linen_cell and type(call.args[0]) is nn.Dense:
        own = params["params"]
        return own["kernel"], own.get("bias")
    if isinstance(step, NnxStep) and step.name == nnx.Linear.__name__:
        module = step.merge(params)
        if type(module) is nnx.Linear:
            return module.kernel[...], None if module.bias is None else module.bias[...]
    return None


def module_name(cell: Cell) -> str:
    """What a reader knows a cell by: the module, function or constructor that it was made of."""
    call, step = call_of(cell), cell.apply
    if isinstance(step, NnxStep):
        return step.name
    made_of = step if call is None else call.args[0] if call.args else call.func
    return getattr(made_of, "__name__", type(made_of).__name__)
