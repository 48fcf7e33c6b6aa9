"""The one table of JAX's primitives: by name, what the rewriting and the analysis of programs rely on.

A primitive that is in none of these is looked into by nobody: it takes the dense, correct path. How units go through
one stands in ``rearrange.py`` and ``analysis/labels.py``, how a gate is cut in ``gates.py``.
``tests/jaxpr/test_jax_contracts.py`` names what a new JAX brings or moves.
"""

from __future__ import annotations

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",  # in place of the two before from JAX 0.12 on
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Calls that mean just their body, and where it stands. ``custom_jvp_call`` holds the primal, without the rule."""

CUSTOM_RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}
"""Calls that mean their body where nothing is differentiated any more."""

ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "clamp", "complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le",
    "lgamma", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "one_minus_square", "or", "polynomial", "pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
])  # fmt: skip
"""Functions of the entries at one place, of operands of one shape or scalars."""

SAME_SHAPE = frozenset([
    "abs", "add", "add_any", "cos", "div", "exp", "expm1", "log", "log1p", "log2", "logistic",
    "max", "min", "mul", "neg", "one_minus_square", "rsqrt", "sign", "sin", "sqrt", "square", "sub", "tan", "tanh",
])  # fmt: skip
"""Primitives of operands of one shape, or scalars, without an axis among their parameters."""

LINEAR_ELEMENTWISE = frozenset([
    "add_any", "add", "sub", "mul", "div", "neg", "select_n", "convert_element_type", "real", "imag", "complex",
    "conj", "reduce_precision",
])  # fmt: skip
"""Those that a program linear in a cotangent is made of."""

PARTWISE = frozenset([
    "add_any", "add", "broadcast_in_dim", "concatenate", "copy", "copy_p", "dynamic_slice", "neg", "pad",
    "reduce_sum", "reshape", "rev", "select_n", "slice", "split", "squeeze", "stack", "sub", "transpose", "unstack",
])  # fmt: skip
"""Primitives that do the same to the real and to the imaginary part; other operands are indices, or a predicate."""

FINITE = frozenset([
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "copy", "copy_p",
    "cos", "eq", "erf", "exp", "floor", "ge", "gt", "is_finite", "le", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "not", "one_minus_square", "or", "polynomial", "reduce_precision", "reshape", "round", "select_n", "sign",
    "sin", "square", "squeeze", "stop_gradient", "sub", "tanh", "xor",
])  # fmt: skip
"""Primitives that are finite for finite operands."""

FINITE_ABOVE = {"log": 0.0, "log1p": -1.0, "log2": 0.0, "rsqrt": 0.0, "sqrt": 0.0}
"""Primitives that are finite above this number, with their slope."""

NONLINEAR_REDUCTIONS = frozenset(
    ["argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"]
)
"""Reductions that no VJP is made of."""

STORED = frozenset(
    ["dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "random_bits", "cumsum", "cumprod"]
)
"""What is too costly to compute a second time: its results are stored by the forward loop."""

VIEWS = frozenset(
    ["copy", "copy_p", "expand_dims", "optimization_barrier", "pvary", "reshape", "squeeze", "stop_gradient"]
)
"""Bytes kept, under another shape."""

FUSED = VIEWS | frozenset([
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "complex", "conj", "convert_element_type",
    "dynamic_slice", "eq", "floor", "gather", "ge", "gt", "imag", "integer_pow", "iota", "is_finite", "le", "lt",
    "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "pad",
    "real", "reduce_precision", "rev", "round",
    "select_n", "sign", "slice", "square", "sub", "xor",
])  # fmt: skip
"""Computed anew in all that reads them."""

FUSED_ONCE = frozenset([
    "acos", "asin", "atan", "atan2", "cbrt", "cos", "cosh", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "log",
    "log1p", "log2", "logistic", "polynomial", "pow", "rem", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh",
    "transpose",
])  # fmt: skip
"""Computed in what reads them, if that is one."""
