"""A whole network as one recursion on vectors: h_t, y_t = step(theta, h_tm1), for one example and one input.

theta, h and y are the real numbers of params, of the carry and of the output, in pytree order, a complex number as two.
What is no real number (integers, PRNG keys) is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.real_leaves import RealView, float32_or_wider
from deepeprop_jax.network.cell import Cell, PyTree

Step = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Flat(NamedTuple):
    """One step of one example.

    Attributes:
      step: ``(theta, h_tm1) -> (h_t, y_t)``.
      theta, h_tm1: where it is taken.
    """

    step: Step
    theta: jax.Array
    h_tm1: jax.Array

    def next_carry(self, theta: jax.Array, h_tm1: jax.Array) -> jax.Array:
        """h_t alone."""
        return self.step(theta, h_tm1)[0]

    def output(self, theta: jax.Array, h_tm1: jax.Array) -> jax.Array:
        """y_t alone."""
        return self.step(theta, h_tm1)[1]


def flat_step(cell: Cell, params: PyTree, carry_tm1: PyTree, x: PyTree) -> Flat:
    """A network's step at these values of one example."""
    view_p, view_h = RealView(params), RealView(carry_tm1)
    p, h = view_p.split(params), view_h.split(carry_tm1)
    dtype = number_type(params, carry_tm1)

    def step(theta: jax.Array, h_tm1: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, before = view_p.join(leaves(view_p, theta), p.other), view_h.join(leaves(view_h, h_tm1), h.other)
        carry_t, y_t = cell.apply(weights, before, x)
        return vector(view_h.split(carry_t).real, dtype), vector(RealView(y_t).split(y_t).real, dtype)

    return Flat(step, vector(p.real, dtype), vector(h.real, dtype))


def number_type(*trees: PyTree) -> np.dtype:
    """One dtype for all real numbers of pytrees, float32 at least."""
    return float32_or_wider(*(dtype for tree in trees for dtype in RealView(tree).dtypes))


def vector(parts: Sequence[jax.Array], dtype: np.dtype) -> jax.Array:
    """Arrays as one vector of a dtype."""
    return jnp.concatenate([jnp.zeros(0, dtype), *(jnp.ravel(part).astype(dtype) for part in parts)])


def leaves(view: RealView, numbers: jax.Array) -> list[jax.Array]:
    """The inverse of ``vector`` for the real leaves of a pytree."""
    return [part.astype(dtype) for part, dtype in zip(view.unflatten(numbers), view.dtypes, strict=True)]


def cotangent(dy: PyTree, y: PyTree, dtype: np.dtype) -> jax.Array:
    """dL/dy, in ``jax.grad``'s convention, as a vector; ``y`` has the output's shapes and dtypes."""
    return vector(RealView(y).split_cotangent(dy), dtype)


def pushed(function: Callable[[jax.Array], jax.Array], at: jax.Array, tangent: jax.Array) -> jax.Array:
    """∂function/∂at · tangent, as the transpose of the VJP: a cell with a ``custom_vjp`` has no forward mode."""
    value, pull = jax.vjp(function, at)
    (found,) = jax.linear_transpose(pull, value)((tangent,))
    return found


def square_root_of_ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    """sqrt(‖above‖ / ‖below‖), which balances two factors of a product; 1 where either is zero."""
    norms = jnp.linalg.norm(above), jnp.linalg.norm(below)
    both = (norms[0] > 0) & (norms[1] > 0)
    return jnp.where(both, jnp.sqrt(norms[0] / jnp.where(both, norms[1], 1)), 1)
