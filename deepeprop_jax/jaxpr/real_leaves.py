"""A pytree seen as real arrays: complex leaves as pairs, integers, keys and what is set aside among the others."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


class Parts(NamedTuple):
    """The two parts of a pytree.

    Attributes:
      real: the differentiable leaves in pytree order; a complex leaf stands as two, real part first.
      other: integer, boolean and PRNG-key leaves, and those set aside, in pytree order.
    """

    real: list[jax.Array]
    other: list[jax.Array]


def shape_and_dtype(leaf: Any, without_axes: int = 0) -> jax.ShapeDtypeStruct:
    """What is known of an array while a program is traced, without its first axes if so wanted."""
    shape, is_type = jnp.shape(leaf)[without_axes:], isinstance(leaf, jax.ShapeDtypeStruct)
    kind = leaf if is_type else jax.typeof(leaf)
    if not getattr(kind.manual_axis_type, "varying", None):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    held = NamedSharding(kind.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=held, manual_axis_type=kind.manual_axis_type)


class RealView:
    """Splits pytrees of one structure into ``Parts`` and joins them again.

    Attributes:
      shapes: shape of each real leaf (of one example; leading axes of values do not matter).
      dtypes: dtype of each real leaf.
      real_avals: both together, with the axes of a mesh along which the leaf varies.
      names: pytree path of each real leaf, with ``.real`` or ``.imag`` behind a complex one.
      set_aside: paths of the leaves that were set aside.
      size: number of real numbers.
    """

    def __init__(self, tree: PyTree, set_aside: Collection[int] = ()):
        """View pytrees structured and shaped as ``tree`` (arrays or ``jax.ShapeDtypeStruct``).

        Args:
          set_aside: indices of leaves that stand among the others, whatever they are.
        """
        paths, self.treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.avals = [shape_and_dtype(leaf) for _, leaf in paths]
        self.kinds = ["other" if i in set_aside else _kind(aval.dtype) for i, aval in enumerate(self.avals)]
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self.names: list[str] = []
        self.other_avals = [aval for aval, kind in zip(self.avals, self.kinds, strict=True) if kind == "other"]
        self.set_aside: list[str] = []
        for i, ((path, _), aval, kind) in enumerate(zip(paths, self.avals, self.kinds, strict=True)):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
            self.set_aside += [name] if i in set_aside else []
            for part in {"real": [""], "complex": [".real", ".imag"], "other": []}[kind]:
                self.shapes.append(aval.shape)
                self.dtypes.append(np.zeros(0, aval.dtype).real.dtype if kind == "complex" else aval.dtype)
                self.names.append(name + part)
        self.real_avals = [
            part if kind == "real" else part.update(dtype=np.zeros(0, part.dtype).real.dtype)
            for aval, kind in zip(self.avals, self.kinds, strict=True)
            for part in {"real": [aval], "complex": [aval, aval], "other": []}[kind]
        ]
        self.sizes = [int(np.prod(shape, dtype=int)) for shape in self.shapes]
        self.size = sum(self.sizes)

    def without(self, leaves: Collection[int]) -> RealView:
        """The same with some leaves set aside."""
        return RealView(jax.tree.unflatten(self.treedef, self.avals), leaves) if leaves else self

    def split(self, tree: PyTree) -> Parts:
        """The real and the other leaves of a pytree."""
        return self.split_leaves(jax.tree.leaves(tree))

    def split_leaves(self, leaves: Sequence[jax.Array]) -> Parts:
        """The same from its flat leaves."""
        real: list[jax.Array] = []
        other: list[jax.Array] = []
        for leaf, kind in zip(leaves, self.kinds, strict=True):
            if kind == "complex":
                real += [jnp.real(leaf), jnp.imag(leaf)]
            else:
                (real if kind == "real" else other).append(leaf)
        return Parts(real, other)

    def join_leaves(self, real: Sequence[jax.Array], other: Sequence[jax.Array]) -> list[jax.Array]:
        """The flat leaves of a pytree from its two parts."""
        reals, others = iter(real), iter(other)
        leaves = []
        for kind in self.kinds:
            if kind == "complex":
                leaves.append(jax.lax.complex(next(reals), next(reals)))
            else:
                leaves.append(next(reals if kind == "real" else others))
        return leaves

    def join(self, real: Sequence[jax.Array], other: Sequence[jax.Array]) -> PyTree:
        """The pytree of two parts."""
        return jax.tree.unflatten(self.treedef, self.join_leaves(real, other))

    def split_cotangent(self, tree: PyTree) -> list[jax.Array]:
        """Cotangents of the real leaves from one in ``jax.grad``'s convention (conjugated where complex)."""
        leaves = [
            jnp.conj(leaf) if kind == "complex" else leaf
            for leaf, kind in zip(jax.tree.leaves(tree), self.kinds, strict=True)
        ]
        return self.split_leaves(leaves).real

    def join_gradient(self, real: Sequence[jax.Array]) -> PyTree:
        """A gradient in ``jax.grad``'s convention, in the leaves' dtypes; zeros for integers, ``float0`` for keys."""
        reals = iter(real)
        leaves: list[Any] = []
        for aval, kind in zip(self.avals, self.kinds, strict=True):
            if kind == "real":
                leaves.append(next(reals).astype(aval.dtype))
            elif kind == "complex":
                leaves.append(jax.lax.complex(next(reals), -next(reals)).astype(aval.dtype))
            elif jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                leaves.append(np.zeros(aval.shape, jax.dtypes.float0))
            else:
                leaves.append(jnp.zeros(aval.shape, aval.dtype))
        return jax.tree.unflatten(self.treedef, leaves)

    def flatten(self, real: Sequence[jax.Array], leading: int = 0) -> jax.Array:
        """All real numbers as one vector, behind ``leading`` axes kept as they are."""
        if not real:
            raise ValueError("flatten() needs at least one real leaf")
        return jnp.concatenate([jnp.reshape(leaf, (*leaf.shape[:leading], -1)) for leaf in real], axis=leading)

    def unflatten(self, vector: jax.Array, axis: int = -1) -> list[jax.Array]:
        """Cut one axis of length ``size`` into the real leaves' shapes; dtype stays."""
        axis %= vector.ndim
        parts = []
        for start, size, shape in zip(np.cumsum([0, *self.sizes]), self.sizes, self.shapes, strict=False):
            part = jax.lax.slice_in_dim(vector, int(start), int(start) + size, axis=axis)
            parts.append(jnp.reshape(part, (*vector.shape[:axis], *shape, *vector.shape[axis + 1 :])))
        return parts


def _kind(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    return "real" if jnp.issubdtype(dtype, jnp.floating) else "other"


def float32_or_wider(*dtypes: Any) -> np.dtype:
    """The smallest dtype that holds all of these, float32 at least, whatever promotion of dtypes the user has set."""
    return functools.reduce(np.promote_types, (np.dtype(dtype) for dtype in dtypes), np.dtype(np.float32))


def select_examples(where: jax.Array, values: PyTree, others: PyTree) -> PyTree:
    """Per example: ``values`` where true, ``others`` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(where.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), values, others)
