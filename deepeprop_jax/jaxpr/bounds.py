"""Whether a program of element-wise functions is finite wherever its inputs are: no pole, short of overflow."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.primitives import FINITE, FINITE_ABOVE
from deepeprop_jax.jaxpr.program import Atom, Equation, Literal, Program, backward_slice, dependents, is_in


def has_finite_slope(vjp: Program) -> bool:
    """Whether a VJP of element-wise functions is proven to give finite cotangents for every finite input."""
    equations = backward_slice(vjp.equations, vjp.outputs)
    moving = dependents(equations, vjp.inputs)
    bounds = {variable: _smallest(value) for variable, value in vjp.constants.items()}

    def bound(atom: Atom) -> float:
        """A number that the atom is never below."""
        return _smallest(atom.val) if isinstance(atom, Literal) else bounds.get(atom, -math.inf)

    for equation in equations:
        lows = [bound(atom) for atom in equation.inputs]
        moves = [is_in(atom, moving) for atom in equation.inputs]
        if any(moves) and not _is_finite(equation, lows, moves):
            return False
        for output in equation.outputs:
            bounds[output] = _bound(equation, lows)
    return True


def _is_finite(equation: Equation, lows: list[float], moves: list[bool]) -> bool:
    name = equation.name
    if name == "div":
        return not moves[1] or lows[1] > 0
    if name == "integer_pow":
        return equation.exponent >= 0 or lows[0] > 0
    return name in FINITE or (name in FINITE_ABOVE and lows[0] > FINITE_ABOVE[name])


_KEPT = ("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "min", "reshape", "squeeze", "stop_gradient")


def _bound(equation: Equation, lows: list[float]) -> float:
    """What an equation's result is never below."""
    name, low = equation.name, min(lows, default=-math.inf)
    above = max(low, 0.0)
    if name in ("add", "add_any"):
        return sum(lows)
    if name in ("exp", "logistic"):
        return 0.0
    if name == "abs":
        return above
    if name == "sqrt":
        return math.sqrt(above)
    if name == "log":  # log2's slope is divided by log(2)
        return math.log(low) if low > 0 else -math.inf
    power = 2 if name == "square" else equation.exponent if name == "integer_pow" else None
    if power in (2, 4):
        return above * above * (1.0 if power == 2 else above * above)  # inf where ** would raise
    if name == "mul":
        same = equation.inputs[0] is equation.inputs[1]
        return above * above if same else lows[0] * lows[1] if low >= 0 else -math.inf
    if name == "max":
        return max(lows)
    if name == "select_n":
        return min(lows[1:])
    if name == "convert_element_type" and not jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating):
        return -math.inf  # an integer may be below
    return low if name in _KEPT else -math.inf


def _smallest(value: jax.Array) -> float:
    """Of a constant; of what is only known later, minus infinity."""
    real = jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.floating)
    if isinstance(value, jax.core.Tracer) or not real or not np.size(value):
        return -math.inf
    return float(np.min(np.asarray(value, float)))
