"""BPTT whose cotangents pass boundaries between segments along a few directions alone: what a projected carry gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.reference.backpropagation import (
    LossFn,
    Run,
    loop_over_segments,
    real_leaves,
    reverse_mode,
    with_real_leaves,
)


def projected_bptt(network: Cell, loss_fn: LossFn, *, segment_length: int, directions: PyTree, lift: PyTree) -> Run:
    """BPTT in which the cotangent k of the carry, at each boundary between segments, is replaced by U Aᵀ k.

    A learner that carries dh/dθ only along R directions U, lifted back by A, can do no more: its gradient must be this
    one. With U Aᵀ the identity it is ``bptt``; with R = 0 it is ``truncated_bptt`` of k = ``segment_length``.

    *Cost*: as ``bptt``, and 2 R numbers times the carry at every boundary.

    Args:
      network, loss_fn: as for ``bptt``.
      segment_length: C; the last segment may be shorter.
      directions: U, a pytree like the carry with an axis of R in place of that of the batch. A complex leaf holds a
        direction of its real part and one of its imaginary part, as real and imaginary part.
      lift: A, of the same shapes.

    Raises:
      ValueError: ``directions`` or ``lift`` that are not shaped as the carry; ``segment_length`` below 1.
    """

    def matrices(tree: PyTree) -> list[jax.Array]:
        return [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in real_leaves(tree)]

    sides = [matrices(tree) for tree in (directions, lift)]

    def boundary(carry: PyTree) -> PyTree:
        reals = real_leaves(carry)
        for name, side in zip(("directions", "lift"), sides, strict=True):
            seen, needed = [leaf.shape[1:] for leaf in side], [(leaf[0].size,) for leaf in reals]
            if seen != needed:
                raise ValueError(
                    f"{name} must be like the carry, with an axis of directions in place of the batch: needed leaves "
                    f"of {needed} numbers each, seen {seen}."
                )
        return with_real_leaves(carry, _through(sides[0], sides[1], reals))

    return reverse_mode(network.apply, loss_fn, loop_over_segments(segment_length, boundary))


def _through(directions: list[jax.Array], lift: list[jax.Array], reals: Sequence[jax.Array]) -> list[jax.Array]:
    """The same values; their cotangents go through U Aᵀ."""

    @jax.custom_vjp
    def identity(reals: list[jax.Array]) -> list[jax.Array]:
        return reals

    def back(_: None, cotangents: list[jax.Array]) -> tuple[list[jax.Array]]:
        flat = [ct.reshape(len(ct), -1) for ct in cotangents]
        found = sum(jnp.einsum("bn,rn->br", ct, a) for ct, a in zip(flat, lift, strict=True))
        return ([(found @ u).reshape(ct.shape) for u, ct in zip(directions, cotangents, strict=True)],)

    identity.defvjp(lambda reals: (reals, None), back)
    return identity(list(reals))
