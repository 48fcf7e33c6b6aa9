"""One tangent of the carry, S ξ, carried forward beside it: what a change ξ of the parameters has made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.real_leaves import RealView, float32_or_wider, select_examples
from deepeprop_jax.network.cell import Cell, PyTree, assemble, select
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.plan import Plan


class Moving(NamedTuple):
    """A carry, and the tangent of its real leaves; other leaves of the tangent mean nothing."""

    carry: PyTree
    tangent: PyTree


def random_tangent(plan: Plan, key: jax.Array, params: PyTree, number: jax.Array | None = None) -> PyTree:
    """ξ ~ N(0, 1) for every real number of the trained parameters, of node ``number`` alone if given; else zero."""
    parts = []
    for v, (view, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        real, other = view.params.split(select(params, vertex.path))
        keys = jax.random.split(jax.random.fold_in(key, v), max(len(real), 1))
        drawn = [
            jax.random.normal(key, leaf.shape, leaf.dtype) if i in plan.trained[v] else jnp.zeros_like(leaf)
            for i, (key, leaf) in enumerate(zip(keys, real, strict=False))
        ]
        if number is not None:
            drawn = [jnp.where(number == v, leaf, 0) for leaf in drawn]
        parts.append(view.params.join(drawn, other))
    return assemble(plan.graph, parts)


def no_tangent(carry: PyTree) -> PyTree:
    """Of a carry that does not depend on the parameters."""
    view = RealView(carry)
    real, other = view.split(carry)
    return view.join([jnp.zeros_like(leaf) for leaf in real], other)


def carry_numbers(plan: Plan, tree: PyTree) -> jax.Array:
    """A carry's real numbers, or a tangent's, in the order of a projection's directions: (batch, N)."""
    parts = []
    for node, vertex in zip(plan.nodes, plan.graph.nodes, strict=True):
        real = node.carry.split(select(tree, vertex.path)).real
        if real:
            by_layer = [leaf.reshape(len(leaf), vertex.depth or 1, -1) for leaf in real]
            parts.append(jnp.concatenate(by_layer, axis=-1).reshape(len(real[0]), -1).astype(plan.dtype))
    return jnp.concatenate(parts, axis=-1)


Cotangent = Callable[[PyTree, PyTree, jax.Array | None], PyTree]
"""``(y, target, valid) -> dL/dy`` of one step, in ``jax.grad``'s convention."""


class Pushed(NamedTuple):
    """A tangent after some steps.

    Attributes:
      moving: the carry and its tangent τ.
      along: the sum over steps of ∂L_t/∂y_t · ẏ_t: the derivative of the loss along ξ.
    """

    moving: Moving
    along: jax.Array


def push_forward(
    network: Cell,
    params: PyTree,
    probe: PyTree,
    start: Moving,
    initial: PyTree,
    inputs: tuple[PyTree, PyTree, Flags],
    cotangent: Cotangent | None = None,
) -> Pushed:
    """τ_t = ∂h_t/∂h_{t-1} τ_{t-1} + ∂h_t/∂θ ξ, step by step, and what it does to the loss.

    Taken from the step's VJP, transposed, so that cells with a ``custom_vjp`` have it too.

    Args:
      probe: ξ, shaped as params.
      initial: what a reset returns to, without tangent.
      inputs: xs and targets, (C, batch, ...), and flags, (C, batch).
      cotangent: that of the output; None where the loss is not asked for.
    """
    apply = jax.vmap(network.apply, (None, 0, 0))
    of_params, of_carry = RealView(params), RealView(start.carry)
    fixed, direction = of_params.split(params), of_params.split(probe).real
    y = jax.eval_shape(apply, params, start.carry, jax.tree.map(lambda leaf: leaf[0], inputs[0]))[1]
    of_output = RealView(y)

    def step(pushed: Pushed, at: tuple[PyTree, PyTree, Flags]) -> tuple[Pushed, None]:
        x, target, (reset, valid) = at
        before = pushed.moving
        if reset is not None:
            before = select_examples(reset, Moving(initial, no_tangent(initial)), before)
        real, other = of_carry.split(before.carry)

        def new(p: list[jax.Array], h: list[jax.Array]) -> tuple[Both, Both]:
            carry, y = apply(of_params.join(p, fixed.other), of_carry.join(h, other), x)
            h_t, y_t = of_carry.split(carry), of_output.split(y)
            h_real = [leaf.astype(like.dtype) for leaf, like in zip(h_t.real, real, strict=True)]
            return (h_real, y_t.real), (h_t.other, y_t.other)

        found, pull, rest = jax.vjp(new, fixed.real, real, has_aux=True)
        ((tangent, dy_real),) = jax.linear_transpose(pull, found)((direction, of_carry.split(before.tangent).real))
        after = Moving(of_carry.join(found[0], rest[0]), of_carry.join(tangent, rest[0]))
        along = pushed.along
        if cotangent is not None:
            dy = of_output.split_cotangent(cotangent(of_output.join(found[1], rest[1]), target, valid))
            along = along + sum(jnp.sum(a * b).astype(along.dtype) for a, b in zip(dy, dy_real, strict=True))
        after = after if valid is None else select_examples(valid, after, pushed.moving)
        return Pushed(after, along), None

    dtype = float32_or_wider(*of_params.dtypes, *of_carry.dtypes)
    return lax.scan(step, Pushed(start, jnp.zeros((), dtype)), inputs)[0]


Both = tuple[list[jax.Array], list[jax.Array]]
"""Of the carry, and of the output."""
