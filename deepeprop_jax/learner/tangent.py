"""One tangent of the carry, S ξ, carried forward beside it: what a change ξ of the parameters has made of it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.real_leaves import RealView, select_examples
from deepeprop_jax.network.cell import Cell, PyTree, assemble, select
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.plan import Plan


class Moving(NamedTuple):
    """A carry, and the tangent of its real leaves; other leaves of the tangent mean nothing."""

    carry: PyTree
    tangent: PyTree


def random_tangent(plan: Plan, key: jax.Array, params: PyTree) -> PyTree:
    """ξ ~ N(0, 1) for every real number of the trained parameters, zero for others."""
    parts = []
    for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        real, other = node.params.split(select(params, vertex.path))
        keys = jax.random.split(jax.random.fold_in(key, v), max(len(real), 1))
        drawn = [
            jax.random.normal(key, leaf.shape, leaf.dtype) if i in plan.trained[v] else jnp.zeros_like(leaf)
            for i, (key, leaf) in enumerate(zip(keys, real, strict=False))
        ]
        parts.append(node.params.join(drawn, other))
    return assemble(plan.graph, parts)


def no_tangent(carry: PyTree) -> PyTree:
    """Of a carry that does not depend on the parameters."""
    view = RealView(carry)
    real, other = view.split(carry)
    return view.join([jnp.zeros_like(leaf) for leaf in real], other)


def carry_numbers(plan: Plan, tree: PyTree) -> jax.Array:
    """A carry's real numbers, or a tangent's, in the order of a projection's directions: (batch, N)."""
    batch = jax.tree.leaves(tree)[0].shape[0]
    parts = [jnp.zeros((batch, 0), plan.dtype)]
    for node, vertex in zip(plan.nodes, plan.graph.nodes, strict=True):
        real = node.carry.split(select(tree, vertex.path)).real
        if real:
            by_layer = [leaf.reshape(batch, vertex.depth or 1, -1) for leaf in real]
            parts.append(jnp.concatenate(by_layer, axis=-1).reshape(batch, -1).astype(plan.dtype))
    return jnp.concatenate(parts, axis=-1)


def push_forward(
    network: Cell, params: PyTree, probe: PyTree, start: Moving, initial: PyTree, xs: PyTree, flags: Flags
) -> PyTree:
    """The tangent after the steps of a segment: τ_t = ∂h_t/∂h_{t-1} τ_{t-1} + ∂h_t/∂θ ξ.

    Taken from the step's VJP, transposed, so that cells with a ``custom_vjp`` have it too.

    Args:
      probe: ξ, shaped as params.
      initial: what a reset returns to, without tangent.
      xs: (C, batch, ...).
      flags: (C, batch).
    """
    apply = jax.vmap(network.apply, (None, 0, 0))
    of_params, of_carry = RealView(params), RealView(start.carry)
    fixed, direction = of_params.split(params), of_params.split(probe).real

    def step(moving: Moving, at: tuple[PyTree, Flags]) -> tuple[Moving, None]:
        x, (reset, valid) = at
        before = moving
        if reset is not None:
            before = select_examples(reset, Moving(initial, no_tangent(initial)), moving)
        real, other = of_carry.split(before.carry)

        def new(p: list[jax.Array], h: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            parts = of_carry.split(apply(of_params.join(p, fixed.other), of_carry.join(h, other), x)[0])
            return [leaf.astype(like.dtype) for leaf, like in zip(parts.real, real, strict=True)], parts.other

        h, pull, rest = jax.vjp(new, fixed.real, real, has_aux=True)
        (tangent,) = jax.linear_transpose(pull, h)((direction, of_carry.split(before.tangent).real))
        after = Moving(of_carry.join(h, rest), of_carry.join(tangent, rest))
        return after if valid is None else select_examples(valid, after, moving), None

    return lax.scan(step, start, (xs, flags))[0].tangent
