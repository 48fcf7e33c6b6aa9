"""How a Flax module is called: (carry, x) if it is a recurrent cell, else x; and what to write where it is neither."""

from __future__ import annotations

import flax.linen as nn
from flax import nnx

from deepeprop_jax.network.plain_function import arguments_of

FLAGS = {"deterministic": True, "use_running_average": True, "train": False, "training": False, "is_training": False}
"""Arguments that tell a layer whether it is trained, and the value that makes its output a function of its input."""

LINEN_CELL = """
    def init(key, x):
        carry = jnp.zeros((x.shape[0], n))
        return module.init(key, carry[0], x[0]), carry
    network = Cell(init, module.apply)
or let its class inherit from nn.RNNCellBase, with an initialize_carry(rng, input_shape)."""

NNX_CELL = """
    graphdef, params = nnx.split(module)
    def step(params, carry, x):
        return nnx.merge(graphdef, params)(carry, x)
    network = Cell(lambda key, x: (params, jnp.zeros((x.shape[0], n))), step)
or let its class inherit from nnx.RNNCellBase, with an initialize_carry(input_shape, rngs)."""

LINEN_FLAGS = """
    class Step(nn.{base}):
        module: nn.Module
        def __call__(self, {inputs}):
            return self.module({inputs}, {given})"""

NNX_FLAGS = """
    class Step(nnx.{base}):
        def __init__(self, module):
            self.module = module
        def __call__(self, {inputs}):
            return self.module({inputs}, {given})"""

LINEN_START = """
        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return self.module.initialize_carry(rng, input_shape)"""

NNX_START = """
        def initialize_carry(self, input_shape, rngs):
            return self.module.initialize_carry(input_shape, rngs)"""

FLAGS_END = """
    network = stack(Step(module))"""


def check_call(module: nn.Module | nnx.Module) -> None:
    """Raise a ``TypeError``, with the lines to write, unless an ``RNNCellBase`` is called with (carry, x) and any other
    module with x alone."""
    kind, name, linen = type(module), type(module).__name__, isinstance(module, nn.Module)
    recurrent = isinstance(module, nn.RNNCellBase | nnx.RNNCellBase)
    inputs = "carry, x" if recurrent else "x"
    if not any("__call__" in vars(base) for base in kind.__mro__):
        raise TypeError(f"{name} has no __call__; needed one that takes ({inputs}).")
    taken = arguments_of(kind.__call__)
    if taken is None:
        return
    count, required = (2 if recurrent else 1), taken.required[1:]  # without self
    flags = [argument for argument in (*required[count:], *taken.keywords) if argument in FLAGS]
    if flags and len(flags) == len(required[count:]) + len(taken.keywords):
        given = ", ".join(f"{flag}={FLAGS[flag]}" for flag in flags)
        base = "RNNCellBase" if recurrent else "Module"
        lines = (LINEN_FLAGS if linen else NNX_FLAGS).format(base=base, inputs=inputs, given=given)
        lines += ((LINEN_START if linen else NNX_START) if recurrent else "") + FLAGS_END
        raise TypeError(f"{name} is called with {', '.join(flags)} too. Fix it, with the module as module:{lines}")
    if len(required) <= count and not taken.keywords and (taken.most is None or taken.most > count):
        return
    seen = ", ".join((*required, *(f"{keyword}=" for keyword in taken.keywords)))
    if not recurrent and len(required) == 2 and not taken.keywords:
        raise TypeError(
            f"{name} is called with ({seen}) and is no {'nn' if linen else 'nnx'}.RNNCellBase, so the shape of its "
            f"carry is not known. If it is (carry, x) -> (carry, y), with n the size of its carry and it as "
            f"module, write:{LINEN_CELL if linen else NNX_CELL}"
        )
    raise TypeError(
        f"{name} is called with ({seen}); needed ({inputs}). Make what is constant an attribute of the module, and "
        f"pass several inputs as one pytree x."
    )
