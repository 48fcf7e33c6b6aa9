"""Complex arithmetic on pairs: the same values and derivatives, and real matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.jaxpr.complex_pairs import Complex, both_parts, evaluate_in_pairs
from deepeprop_jax.jaxpr.program import backward_slice
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.jaxpr.trace import trace

Z = jax.ShapeDtypeStruct((3,), jnp.complex128)
W = jax.ShapeDtypeStruct((3, 3), jnp.complex128)
X = jax.ShapeDtypeStruct((3,), jnp.float64)

FUNCTIONS = {
    "arithmetic": lambda z, w, x: (
        z * z[::-1] - 2j * z + (x / 3).astype(z.dtype) - jnp.conj(z) / x.astype(z.dtype),
        z**2,
        -z,
    ),
    "products": lambda z, w, x: (w @ z, (x @ w).real, (w @ z).imag, jnp.vdot(z, w @ x), w.T @ w),
    "no imaginary part": lambda z, w, x: (jnp.exp(x.astype(z.dtype)), x.astype(z.dtype) @ w, jnp.conj(x)),
    "exponential": lambda z, w, x: (jnp.exp(z), jnp.exp(1j * x) * z, jnp.square(z)),
    "no rule": lambda z, w, x: (jnp.log(z), jnp.abs(z), jnp.tanh(w), z / (z + 2), z**3, jnp.sqrt(z)),
    "rearranged": lambda z, w, x: (
        jnp.concatenate([z, z[:1]]),
        w.T.reshape(9),
        jnp.where(x > 0, z, 1),
        w.sum(0),
        jnp.pad(z, 1, constant_values=1j),
        jnp.stack([z, z * 1j]),
        jax.lax.dynamic_slice(z, (1,), (2,)),
        jnp.broadcast_to(z, (2, 3)),
    ),
    "branches and loops": lambda z, w, x: (
        jax.lax.cond(x[0] > 0, lambda z: z * 1j, lambda z: z, z),
        jax.lax.fori_loop(0, 3, lambda _, z: w @ z, z),
    ),
    "of a scalar": lambda z, w, x: (jax.lax.complex(x, 0.0) @ w, jax.lax.complex(0.0, x) * z, jax.lax.complex(x, 1.0)),
    "taken apart": lambda z, w, x: (jax.lax.complex(z.imag, z.real), jnp.angle(z), z.real @ x),
}


def _arguments() -> list:
    draw = np.random.default_rng(0)

    def of(like: jax.ShapeDtypeStruct) -> np.ndarray:
        found = draw.normal(size=like.shape)
        return found + 1j * draw.normal(size=like.shape) if jnp.issubdtype(like.dtype, jnp.complexfloating) else found

    return [of(like) for like in (Z, W, X)]


def _in_pairs(function):
    """The function of real leaves, computed on pairs."""
    program = trace(function, Z, W, X)
    view, outputs = RealView((Z, W, X)), RealView(jax.eval_shape(function, Z, W, X))

    def run(real: list) -> list:
        known = {**program.constants, **dict(zip(program.inputs, view.join_leaves(real, [], Complex), strict=True))}
        return outputs.split_leaves(evaluate_in_pairs(program.equations, known, program.outputs), both_parts).real

    return run, view, outputs


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_are_those_of_complex_arithmetic(name: str) -> None:
    run, view, outputs = _in_pairs(FUNCTIONS[name])
    real = view.split(_arguments()).real
    wanted, pull = jax.vjp(lambda real: outputs.split(FUNCTIONS[name](*view.join(real, []))).real, real)
    found, pull_pairs = jax.vjp(run, real)
    draw = np.random.default_rng(1)
    cotangent = [draw.normal(size=leaf.shape) for leaf in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        assert a.dtype == b.dtype
    for a, b in zip(pull_pairs(cotangent)[0], pull(cotangent)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_an_overflow_stays_on_its_axis() -> None:
    """As in complex arithmetic: the exponential of a large real number has no imaginary part."""
    run, _, _ = _in_pairs(lambda z, w, x: jnp.exp(jax.lax.complex(1e4 * jnp.abs(x), 0 * x)))
    re, im = run(RealView((Z, W, X)).split(_arguments()).real)
    assert bool(jnp.isinf(re).all()) and not im.any()


@pytest.mark.mixed_promotion
def test_a_product_with_real_numbers_is_two_real_ones() -> None:
    """And reading one part of a complex one takes two of its four; nothing complex is left."""

    def lru(z, w, x):
        return (w @ (z * (x @ w))).real

    run, view, _ = _in_pairs(lru)
    program = trace(run, [jax.ShapeDtypeStruct(*leaf) for leaf in zip(view.shapes, view.dtypes, strict=True)])
    equations = backward_slice(program.equations, program.outputs)
    assert not {"complex", "real", "imag"} & {equation.name for equation in equations}
    assert not any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for e in equations for v in e.outputs)
    assert [equation.name for equation in equations].count("dot_general") == 4
