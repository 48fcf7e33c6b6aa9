"""Every layout of JAX's programs that this library relies on: a new JAX that moves one fails here, by name."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.jaxpr import bounds as finite
from deepeprop_jax.jaxpr import primitives
from deepeprop_jax.jaxpr import program as jaxprs
from deepeprop_jax.jaxpr.batched import evaluate
from deepeprop_jax.jaxpr.rearrange import is_structural, rearrange
from deepeprop_jax.jaxpr.trace import inside, trace


def equations(function, *args):
    return trace(function, *args).equations


def only(function, *args, name):
    found = [equation for equation in equations(function, *args) if equation.name == name]
    assert len(found) == 1, [equation.name for equation in equations(function, *args)]
    return found[0]


MATRIX = jnp.arange(12.0).reshape(3, 4)

STRUCTURAL = {
    "reshape": (lambda x: jnp.reshape(x, (2, 6)), (MATRIX,), {"new_sizes", "dimensions"}),
    "transpose": (lambda x: x.T, (MATRIX,), {"permutation"}),
    "broadcast_in_dim": (
        lambda x: jax.lax.broadcast_in_dim(x, (2, 3, 5, 4), (1, 3)),
        (MATRIX,),
        {"shape", "broadcast_dimensions"},
    ),
    "concatenate": (lambda x, y: jnp.concatenate([x, y], 1), (MATRIX, MATRIX[:, :2] + 50), {"dimension"}),
    "stack": (lambda x, y: jnp.stack([x, y], 1), (MATRIX, MATRIX + 50), {"axis"}),
    "slice": (lambda x: x[1:, ::2], (MATRIX,), {"start_indices", "limit_indices", "strides"}),
    "split": (lambda x: jnp.split(x, [1, 3], 1), (MATRIX,), {"sizes", "axis"}),
    "squeeze": (lambda x: jax.lax.squeeze(x, (1,)), (MATRIX[:, :1],), {"dimensions"}),
    "rev": (lambda x: jax.lax.rev(x, (1,)), (MATRIX,), {"dimensions"}),
    "pad": (lambda x: jax.lax.pad(x, -1.0, ((1, 2, 1), (-1, 3, 0))), (MATRIX,), {"padding_config"}),
    "copy": (lambda x: jax.lax.copy_p.bind(x) if hasattr(jax.lax, "copy_p") else jnp.copy(x), (MATRIX,), set()),
}


@pytest.mark.parametrize("name", list(STRUCTURAL))
def test_structural_primitives_move_labels_as_they_move_values(name):
    function, args, params = STRUCTURAL[name]
    equation = only(function, *args, name=name) if name != "stack" else _stack(function, args)
    assert params <= set(equation.params)
    operands = [np.asarray(arg) for arg in args] + ([np.asarray(-1.0)] if name == "pad" else [])
    assert is_structural(equation)
    seen = rearrange(equation, operands)
    needed = jax.tree.leaves(function(*args))
    for a, b in zip(seen, needed, strict=True):
        np.testing.assert_array_equal(a, b)


def _stack(function, args):
    """A primitive of its own in some versions of JAX; a concatenate of reshapes in others, which is covered too."""
    found = [equation for equation in equations(function, *args) if equation.name == "stack"]
    if found:
        return found[0]
    program = trace(function, *args)
    assert {equation.name for equation in program.equations} <= {"broadcast_in_dim", "reshape", "concatenate"}

    return jaxprs.Equation(jex.Primitive("stack"), {"axis": 1}, [], [])


def test_calls_are_inlined_and_custom_rules_are_not():
    @jax.custom_jvp
    def rule(x):
        return x

    rule.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
    function = jax.jit(lambda x: jax.checkpoint(lambda y: jnp.sin(y) + rule(y))(x))
    names = {equation.name for equation in equations(function, 1.0)}
    assert {"sin", "custom_jvp_call"} <= names
    assert not names & set(primitives.CALLS)
    linear = {e.name for e in equations(lambda x, ct: jax.vjp(function, x)[1](ct), 1.0, 1.0)}
    assert not {"custom_jvp_call", "custom_vjp_call"} & linear


def test_a_traced_function_is_inlined():
    """JAX 0.10 inlines it itself; JAX 0.12 has a call for it."""
    traced = jax.jit(lambda x: jnp.sin(x) * 2).trace(1.0)
    assert [equation.name for equation in equations(traced, 1.0)] == ["sin", "mul"]


ACTIVATIONS = {
    **{name: getattr(jax.nn, name) for name in ("sigmoid", "soft_sign", "silu", "hard_tanh", "leaky_relu", "gelu")},
    **{name: getattr(jnp, name) for name in ("tanh", "sin", "exp", "log1p", "log2", "sqrt", "square", "abs")},
    "softer": lambda x: jnp.log2(1 + x * x) + x**3 / jnp.maximum(1.0, jnp.abs(x)),
}


def test_activations_and_their_slopes_are_made_of_known_primitives():
    """A primitive that is new in JAX costs speed where it stands between the gates of a wide product (unconcatenate),
    and a slot of a trace where a leaf is a function of another (finite): found here, by name."""

    def slope(function):
        return trace(lambda x, ct: jax.vjp(function, x)[1](ct), MATRIX, MATRIX)

    unknown = {
        name: {e.name for e in slope(function).equations} - primitives.ELEMENTWISE - {"broadcast_in_dim"}
        for name, function in ACTIVATIONS.items()
    }
    assert not any(unknown.values()), unknown
    endless = {name for name, function in ACTIVATIONS.items() if not finite.has_finite_slope(slope(function))}
    assert endless == {"log1p", "log2", "sqrt"}


@pytest.mark.mixed_promotion
def test_a_program_computes_what_the_function_does():
    cell = nn.OptimizedLSTMCell(features=3)
    carry, x = (jnp.ones(3), jnp.ones(3)), jnp.ones(2)
    params = cell.init(jax.random.key(0), carry, x)
    program = trace(cell.apply, params, carry, x)
    values = dict(zip(program.inputs, jax.tree.leaves((params, carry, x)), strict=True))
    seen = evaluate(program.equations, values | program.constants, program.outputs)
    for a, b in zip(seen, jax.tree.leaves(cell.apply(params, carry, x)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dot_axes():
    equation = only(
        lambda a, b: jnp.einsum("bik,bkj->bij", a, b), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)), name="dot_general"
    )
    axes = jaxprs.dot_axes(equation)
    assert axes == (([0], [1], [2]), ([0], [2], [1]))


def test_weights_come_last_where_a_moving_vector_meets_them():
    keys = jax.random.split(jax.random.key(0), 4)
    weight, square, x, h = (
        jax.random.normal(key, s) for key, s in zip(keys, [(3, 4), (3, 3), (4,), (3,)], strict=True)
    )

    def function(weight, square, x, h):
        both = jnp.dot(weight, x, precision=("highest", "default")) + square @ h
        return both, h @ square, h @ both, square @ weight, weight @ jnp.outer(x, x)

    program = trace(function, weight, square, x, h)
    moved = jaxprs.weights_last(program, program.inputs[2:])
    dots, before = ([e for e in p.equations if e.name == "dot_general"] for p in (moved, program))
    assert [e.inputs == b.inputs[::-1] for e, b in zip(dots, before, strict=True)] == [True, True] + [False] * 4
    assert [str(part) for part in dots[0].params["precision"]] == ["DEFAULT", "HIGHEST"]
    environment = dict(zip(moved.inputs, (weight, square, x, h), strict=True))
    for seen, needed in zip(
        evaluate(moved.equations, environment, moved.outputs), function(weight, square, x, h), strict=True
    ):
        np.testing.assert_allclose(seen, needed, rtol=1e-12)


def test_scan_and_cond_carry_their_bodies_and_can_be_bound_again():
    def function(x):
        y, _ = jax.lax.scan(lambda c, a: (c * a, None), x, jnp.arange(1.0, 4.0))
        return jax.lax.cond(y > 0, jnp.sin, jnp.cos, y)

    program = trace(function, 2.0)
    assert {"scan", "cond"} <= {equation.name for equation in program.equations}
    (seen,) = evaluate(program.equations, {program.inputs[0]: jnp.asarray(2.0)} | program.constants, program.outputs)
    assert jnp.allclose(seen, jnp.sin(12.0))


def test_names_used_from_jax_extend():
    assert isinstance(jaxprs.Literal, type)
    assert hasattr(jex.Primitive, "get_bind_params")
    program = trace(lambda x: x * 2.0, 1.0)
    assert not jaxprs.is_variable(program.equations[0].inputs[1])


def test_what_a_scan_carries_is_told_by_shapes():
    def function(weight, key, start, xs):
        def body(carry, x):
            h, count = carry
            return (h * weight + x, count + 1), (h, x.sum())

        return jax.lax.scan(body, (start, 0), xs)[1], key

    program = trace(function, jnp.ones(2), jax.random.key(0), jnp.ones(2), jnp.ones((3, 2)))
    (scan,) = [equation for equation in program.equations if equation.name == "scan"]
    found = inside(scan)
    assert found is not None
    assert (found.fixed, found.carried, found.start) == (1, [(1, 0), (2, 1)], [1, 2])
