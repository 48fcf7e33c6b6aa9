"""Arrays inside ``jax.shard_map``: along which axes of the mesh they vary, that is, differ between devices.

JAX holds that in an array's type and wants it equal for all operands of a primitive, for what enters and leaves a turn
of a loop, and for an output and its cotangent. Its functions see to operands; the rest is seen to here. Outside
``shard_map``, and where it is called with ``check_vma=False``, no array varies, and nothing here does anything.
"""

from __future__ import annotations

from typing import TypeVar

import jax

Tree = TypeVar("Tree")


def varying_axes(*trees: object) -> frozenset[str]:
    """All axes along which any leaf varies; leaves may be arrays, or types with shape and dtype."""
    return frozenset().union(*map(_axes_of, jax.tree.leaves(trees)))


def _axes_of(leaf: jax.Array) -> frozenset[str]:
    kind = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
    return getattr(kind.manual_axis_type, "varying", frozenset())


def vary(tree: Tree, axes: frozenset[str]) -> Tree:
    """Values of a type that varies along ``axes`` too."""

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes_of(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def vary_like(tree: Tree, *others: object) -> Tree:
    """Values of a type that varies along all axes along which ``others`` vary."""
    return vary(tree, varying_axes(*others))


def vary_alike(*trees: Tree) -> tuple[Tree, ...]:
    """Pytrees whose every leaf varies along all axes along which any does."""
    return vary(trees, varying_axes(trees))


def any_anywhere(flags: jax.Array) -> jax.Array:
    """Whether any is true, on any of the devices between which they differ."""
    axes = tuple(sorted(varying_axes(flags)))
    return jax.lax.psum(flags.any().astype(int), axes) > 0 if axes else flags.any()


def summed_like(gradient: Tree, params: Tree) -> Tree:
    """A gradient of the types of the params, as ``jax.grad`` gives it.

    Where devices hold the same params their gradients are summed, in one ``psum``; where params vary, each device keeps
    its own.
    """
    leaves, structure = jax.tree.flatten(gradient)
    by_axes: dict[tuple[str, ...], list[int]] = {}
    for i, (grad, param) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True)):
        axes = () if grad.dtype == jax.dtypes.float0 else tuple(sorted(_axes_of(grad) - _axes_of(param)))
        by_axes.setdefault(axes, []).append(i)
    for axes, places in by_axes.items():
        if axes:
            for i, total in zip(places, jax.lax.psum([leaves[i] for i in places], axes), strict=True):
                leaves[i] = total
    return jax.tree.unflatten(structure, leaves)
