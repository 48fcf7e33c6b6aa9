"""Complex numbers as pairs of real ones: the same program in real arithmetic.

    (a + ib)(c + id) = (ac - bd) + i(ad + bc)        and where b is known to be zero, ac + i ad

The carry is analysed in real parts anyway. A complex matrix product is two real ones where one factor is real (an
input) or one part of the result is read (``.real``); XLA's CPU backend has no fast complex one, nor does it vectorise
complex arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.batched import bind, evaluate
from deepeprop_jax.jaxpr.primitives import PARTWISE
from deepeprop_jax.jaxpr.program import Atom, Equation, Variable
from deepeprop_jax.jaxpr.real_leaves import real_dtype


class Complex(NamedTuple):
    """A complex value.

    Attributes:
      re: its real part.
      im: its imaginary part; None where that is zero whatever the operands are.
    """

    re: jax.Array
    im: jax.Array | None

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Complex:
        """A linear function of both parts."""
        return Complex(function(self.re), None if self.im is None else function(self.im))


Value: TypeAlias = jax.Array | Complex


def both_parts(x: Value) -> tuple[jax.Array, jax.Array]:
    """The real and the imaginary part."""
    re, im = _as_pair(x)
    return re, jnp.zeros_like(re) if im is None else im


def evaluate_in_pairs(
    equations: Sequence[Equation], environment: Mapping[Variable, Value], outputs: Sequence[Atom]
) -> list[Value]:
    """As ``batched.evaluate``; complex values, there and in the result, are pairs.

    What has no rule here (a branch, a loop, a custom derivative, a complex exponential) is computed as it stands.
    """
    pairs = {variable: _pair_if_complex(x) for variable, x in environment.items()}
    return [_pair_if_complex(x) for x in evaluate(equations, pairs, outputs, _rule)]


def _rule(equation: Equation, *values: Value) -> list[Value]:
    values = tuple(map(_pair_if_complex, values))
    results = [jnp.issubdtype(variable.aval.dtype, jnp.complexfloating) for variable in equation.outputs]
    if not any(isinstance(x, Complex) for x in values) and not any(results):
        return bind(equation, *values)
    if equation.name in PARTWISE:
        return _partwise(equation, values)
    rule = _RULES.get(equation.name)
    found = None if rule is None else rule(equation, *values)
    if found is None:
        whole = [lax.complex(*both_parts(x)) if isinstance(x, Complex) else x for x in values]
        return [_as_pair(x) if is_complex else x for x, is_complex in zip(bind(equation, *whole), results, strict=True)]
    return [found]


def _partwise(equation: Equation, values: Sequence[Value]) -> list[Value]:
    re = bind(equation, *(x.re if isinstance(x, Complex) else x for x in values))
    if all(x.im is None for x in values if isinstance(x, Complex)):
        return [Complex(x, None) for x in re]
    im = bind(equation, *(both_parts(x)[1] if isinstance(x, Complex) else x for x in values))
    return [Complex(*parts) for parts in zip(re, im, strict=True)]


def _dot_general(equation: Equation, a: Value, b: Value) -> Complex:
    wide = equation.preferred_dtype
    dtype = None if wide is None else real_dtype(wide)
    real = equation.replaced(equation.inputs, equation.outputs, preferred_element_type=dtype)
    return _product(a, b, lambda x, y: bind(real, x, y)[0])


def _product(a: Value, b: Value, times: Callable[[jax.Array, jax.Array], jax.Array] = lax.mul) -> Complex:
    a, b = (x if isinstance(x, Complex) else Complex(x, None) for x in (a, b))  # a matrix product may mix dtypes
    re = times(a.re, b.re)
    if a.im is not None and b.im is not None:
        re = lax.sub(re, times(a.im, b.im))
    mixed = [times(x, y) for x, y in ((a.re, b.im), (a.im, b.re)) if x is not None and y is not None]
    return Complex(re, lax.add(*mixed) if len(mixed) == 2 else mixed[0] if mixed else None)


def _convert(equation: Equation, x: Value) -> Value:
    new = equation.outputs[0].aval.dtype
    if not jnp.issubdtype(new, jnp.complexfloating):
        return lax.convert_element_type(x.re, new)
    pair = x if isinstance(x, Complex) else Complex(x, None)
    return pair.map(lambda part: lax.convert_element_type(part, real_dtype(new)))


_RULES: dict[str, Callable[..., Value | None]] = {
    "complex": lambda equation, *parts: Complex(*(jnp.broadcast_to(x, equation.outputs[0].aval.shape) for x in parts)),
    "real": lambda equation, x: x.re,
    "imag": lambda equation, x: both_parts(x)[1],
    "conj": lambda equation, x: (
        Complex(x.re, None if x.im is None else lax.neg(x.im)) if isinstance(x, Complex) else Complex(x, None)
    ),
    "convert_element_type": _convert,
    "div": lambda equation, a, b: a.map(lambda part: lax.div(part, b.re)) if b.im is None else None,
    "dot_general": _dot_general,
    "integer_pow": lambda equation, x: _product(x, x) if equation.exponent == 2 else None,
    "mul": lambda equation, a, b: _product(a, b),
    "square": lambda equation, x: _product(x, x),
}
"""How to compute one; None where it has to be computed on complex numbers after all."""


def _pair_if_complex(x: Value) -> Value:
    if isinstance(x, Complex) or not jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating):
        return x
    return _as_pair(x)


def _as_pair(x: Value) -> Complex:
    return x if isinstance(x, Complex) else Complex(jnp.real(x), jnp.imag(x))
