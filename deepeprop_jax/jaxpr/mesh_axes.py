"""Arrays inside ``jax.shard_map``: along which axes of the mesh they vary, that is, differ between devices.

JAX holds that in an array's type and wants it equal for all operands of a primitive, for what enters and leaves a turn
of a loop, and for an output and its cotangent. Its functions see to operands; the rest is seen to here. Outside
``shard_map``, and where it is called with ``check_vma=False``, no array varies, and nothing here does anything.
"""

from __future__ import annotations

from typing import Any

import jax

PyTree = Any


def varying_axes(*trees: PyTree) -> frozenset[str]:
    """All axes along which any leaf varies; leaves may be arrays, or types with shape and dtype."""
    return frozenset().union(*(_axes_of(leaf) for leaf in jax.tree.leaves(trees)))


def vary(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """The same values, of a type that varies along ``axes`` too."""

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _axes_of(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def vary_like(tree: PyTree, *others: PyTree) -> PyTree:
    """The same values, of a type that varies along all axes along which ``others`` vary."""
    return vary(tree, varying_axes(*others))


def _axes_of(leaf: Any) -> frozenset[str]:
    kind = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
    return getattr(kind.manual_axis_type, "varying", frozenset())


def vary_alike(*trees: PyTree) -> tuple[PyTree, ...]:
    """The same pytrees; every leaf varies along all axes along which any does."""
    axes = varying_axes(trees)
    return tuple(vary(tree, axes) for tree in trees)


def summed_like(gradient: PyTree, params: PyTree) -> PyTree:
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
