"""Complex numbers as pairs of real ones: the same program in real arithmetic.

    (a + ib)(c + id) = (ac - bd) + i(ad + bc)        and where b is known to be zero, ac + i ad

The carry is analysed in real parts anyway. A complex matrix product is two real ones where one factor is real (an
input) or one part of the result is read (``.real``); XLA's CPU backend has no fast complex one, nor does it vectorise
complex arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr.primitives import PARTWISE
from deepeprop_jax.jaxpr.program import Atom, Equation, Variable, bind, evaluate
from deepeprop_jax.jaxpr.real_leaves import Parts, RealView


class Pair(NamedTuple):
    """A complex value.

    Attributes:
      re: its real part.
      im: its imaginary part; None where that is zero whatever the operands are.
    """

    re: Any
    im: Any


def join_pairs(view: RealView, real: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """As ``RealView.join_leaves``, with pairs for complex leaves."""
    reals, others = iter(real), iter(other)
    return [
        Pair(next(reals), next(reals)) if kind == "complex" else next(reals if kind == "real" else others)
        for kind in view.kinds
    ]


def split_pairs(view: RealView, leaves: Sequence[Any]) -> Parts:
    """As ``RealView.split_leaves``, of leaves that may be pairs."""
    real: list[Any] = []
    other: list[Any] = []
    for leaf, kind in zip(leaves, view.kinds, strict=True):
        if kind == "complex":
            real += _full(_as_pair(leaf))
        else:
            (real if kind == "real" else other).append(leaf)
    return Parts(real, other)


def evaluate_in_pairs(
    equations: Sequence[Equation], environment: dict[Variable, Any], outputs: Sequence[Atom]
) -> list[Any]:
    """As ``program.evaluate``; complex values, there and in the result, are pairs.

    What has no rule here (a branch, a loop, a custom derivative, a complex exponential) is computed as it stands.
    """
    pairs = {variable: _as_pair(x) if _is_complex(x) else x for variable, x in environment.items()}
    return [_as_pair(x) if _is_complex(x) else x for x in evaluate(equations, pairs, outputs, _rule)]


def _rule(equation: Equation, *values: Any) -> list[Any]:
    values = tuple(_as_pair(x) if _is_complex(x) else x for x in values)
    results = [jnp.issubdtype(variable.aval.dtype, jnp.complexfloating) for variable in equation.outputs]
    if not any(isinstance(x, Pair) for x in values) and not any(results):
        return bind(equation, *values)
    if equation.name in PARTWISE:
        return _partwise(equation, values)
    rule = _RULES.get(equation.name)
    found = None if rule is None else rule(equation, *values)
    if found is None:
        whole = [lax.complex(*_full(x)) if isinstance(x, Pair) else x for x in values]
        return [_as_pair(x) if is_complex else x for x, is_complex in zip(bind(equation, *whole), results, strict=True)]
    return [found]


def _partwise(equation: Equation, values: Sequence[Any]) -> list[Any]:
    pairs = [x for x in values if isinstance(x, Pair)]
    re = bind(equation, *(x.re if isinstance(x, Pair) else x for x in values))
    if all(x.im is None for x in pairs):
        return [Pair(x, None) for x in re]
    im = bind(equation, *(_full(x)[1] if isinstance(x, Pair) else x for x in values))
    return [Pair(*parts) for parts in zip(re, im, strict=True)]


def _mul(equation: Equation, a: Any, b: Any) -> Pair:
    return _product(a, b, lax.mul)


def _dot_general(equation: Equation, a: Any, b: Any) -> Pair:
    params = dict(equation.params)
    wide = params.get("preferred_element_type")
    params["preferred_element_type"] = None if wide is None else _real_dtype(wide)
    real = Equation(equation.primitive, params, equation.inputs, equation.outputs)
    return _product(a, b, lambda x, y: bind(real, x, y)[0])


def _product(a: Any, b: Any, times: Callable[[Any, Any], Any]) -> Pair:
    a, b = (x if isinstance(x, Pair) else Pair(x, None) for x in (a, b))  # a matrix product may mix dtypes
    re = times(a.re, b.re)
    if a.im is not None and b.im is not None:
        re = lax.sub(re, times(a.im, b.im))
    mixed = [times(x, y) for x, y in ((a.re, b.im), (a.im, b.re)) if x is not None and y is not None]
    return Pair(re, lax.add(*mixed) if len(mixed) == 2 else mixed[0] if mixed else None)


def _div(equation: Equation, a: Pair, b: Pair) -> Pair | None:
    if b.im is not None:
        return None
    return Pair(lax.div(a.re, b.re), None if a.im is None else lax.div(a.im, b.re))


def _integer_pow(equation: Equation, x: Pair) -> Pair | None:
    return _product(x, x, lax.mul) if equation.params["y"] == 2 else None


def _convert(equation: Equation, x: Any) -> Any:
    new = equation.params["new_dtype"]
    if not jnp.issubdtype(new, jnp.complexfloating):
        return lax.convert_element_type(x.re, new)
    re, im = x if isinstance(x, Pair) else (x, None)
    dtype = _real_dtype(new)
    return Pair(lax.convert_element_type(re, dtype), None if im is None else lax.convert_element_type(im, dtype))


_RULES: dict[str, Callable[..., Any]] = {
    "complex": lambda equation, *parts: Pair(*(jnp.broadcast_to(x, equation.outputs[0].aval.shape) for x in parts)),
    "real": lambda equation, x: x.re,
    "imag": lambda equation, x: _full(x)[1],
    "conj": lambda equation, x: (
        Pair(x.re, None if x.im is None else lax.neg(x.im)) if isinstance(x, Pair) else Pair(x, None)
    ),
    "convert_element_type": _convert,
    "div": _div,
    "dot_general": _dot_general,
    "integer_pow": _integer_pow,
    "mul": _mul,
    "square": lambda equation, x: _product(x, x, lax.mul),
}


def _is_complex(x: Any) -> bool:
    return not isinstance(x, Pair) and jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating)


def _as_pair(x: Any) -> Pair:
    return x if isinstance(x, Pair) else Pair(jnp.real(x), jnp.imag(x))


def _full(x: Pair) -> list[Any]:
    return [x.re, jnp.zeros_like(x.re) if x.im is None else x.im]


def _real_dtype(dtype: Any) -> Any:
    return np.zeros(0, dtype).real.dtype
