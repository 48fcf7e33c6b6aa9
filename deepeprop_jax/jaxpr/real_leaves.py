"""A pytree seen as real arrays: complex leaves as pairs, integers, keys and what is set aside among the others."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


class Kind(enum.Enum):
    """What a leaf is; the value is the number of real leaves that it stands as."""

    OTHER = 0
    REAL = 1
    COMPLEX = 2


class Parts(NamedTuple):
    """The two parts of a pytree.

    Attributes:
      real: the differentiable leaves in pytree order; a complex leaf stands as two, real part first.
      other: integer, boolean and PRNG-key leaves, and those set aside, in pytree order.
    """

    real: list[jax.Array]
    other: list[jax.Array]


def shape_and_dtype(leaf: jax.Array, without_axes: int = 0) -> jax.ShapeDtypeStruct:
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
      avals, kinds: of every leaf of the pytree.
      other_avals: of the leaves that are no real ones.
      real_avals: shape and dtype of each real leaf (of one example; leading axes of values do not matter), with the
        axes of a mesh along which it varies; ``shapes`` and ``dtypes`` on their own.
      names: pytree path of each real leaf, with ``.real`` or ``.imag`` behind a complex one.
      set_aside: paths of the leaves that were set aside.
      size: number of real numbers; ``sizes`` of each real leaf.
    """

    def __init__(self, tree: PyTree, set_aside: Collection[int] = ()):
        """View pytrees structured and shaped as ``tree`` (arrays or ``jax.ShapeDtypeStruct``).

        Args:
          set_aside: indices of leaves that stand among the others, whatever they are.
        """
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.treedef: jax.tree_util.PyTreeDef = treedef
        self.avals: list[jax.ShapeDtypeStruct] = [shape_and_dtype(leaf) for _, leaf in paths]
        self.kinds: list[Kind] = [
            Kind.OTHER if i in set_aside else _kind(aval.dtype) for i, aval in enumerate(self.avals)
        ]
        self.other_avals: list[jax.ShapeDtypeStruct] = [
            aval for aval, kind in zip(self.avals, self.kinds, strict=True) if kind is Kind.OTHER
        ]
        self.real_avals: list[jax.ShapeDtypeStruct] = []
        self.names: list[str] = []
        names = [jax.tree_util.keystr(path, simple=True, separator="/") or "value" for path, _ in paths]
        for name, aval, kind in zip(names, self.avals, self.kinds, strict=True):
            if kind is Kind.REAL:
                self.real_avals.append(aval)
                self.names.append(name)
            elif kind is Kind.COMPLEX:
                self.real_avals += [aval.update(dtype=real_dtype(aval.dtype))] * 2
                self.names += [name + ".real", name + ".imag"]
        self.set_aside: list[str] = [name for i, name in enumerate(names) if i in set_aside]
        self.shapes: list[tuple[int, ...]] = [aval.shape for aval in self.real_avals]
        self.dtypes: list[np.dtype] = [aval.dtype for aval in self.real_avals]
        self.sizes: list[int] = [int(np.prod(shape, dtype=int)) for shape in self.shapes]
        self.size: int = sum(self.sizes)

    def without(self, leaves: Collection[int]) -> RealView:
        """The view in which some leaves are set aside."""
        return RealView(jax.tree.unflatten(self.treedef, self.avals), leaves) if leaves else self

    def split(self, tree: PyTree) -> Parts:
        """The real and the other leaves of a pytree."""
        return self.split_leaves(jax.tree.leaves(tree))

    def split_leaves(
        self, leaves: Sequence[jax.Array], parts: Callable = lambda leaf: (jnp.real(leaf), jnp.imag(leaf))
    ) -> Parts:
        """The real and the other ones of a pytree's flat leaves; ``parts`` gives the two parts of a complex one."""
        found = Parts([], [])
        for leaf, kind in zip(leaves, self.kinds, strict=True):
            if kind is Kind.COMPLEX:
                found.real.extend(parts(leaf))
            else:
                (found.real if kind is Kind.REAL else found.other).append(leaf)
        return found

    def join_leaves(
        self, real: Sequence[jax.Array], other: Sequence[jax.Array], pair: Callable = jax.lax.complex
    ) -> list[jax.Array]:
        """The flat leaves of a pytree from its two parts; ``pair`` makes a complex one."""
        reals, others = iter(real), iter(other)
        return [
            pair(next(reals), next(reals)) if kind is Kind.COMPLEX else next(reals if kind is Kind.REAL else others)
            for kind in self.kinds
        ]

    def join(self, real: Sequence[jax.Array], other: Sequence[jax.Array]) -> PyTree:
        """The pytree of two parts."""
        return jax.tree.unflatten(self.treedef, self.join_leaves(real, other))

    def split_cotangent(self, tree: PyTree) -> list[jax.Array]:
        """Cotangents of the real leaves from one in ``jax.grad``'s convention (conjugated where complex)."""
        return self.split_leaves(jax.tree.leaves(tree), lambda leaf: (jnp.real(leaf), -jnp.imag(leaf))).real

    def join_gradient(self, real: Sequence[jax.Array]) -> PyTree:
        """A gradient in ``jax.grad``'s convention, in the leaves' dtypes; zeros for integers, ``float0`` for keys."""
        zeros = [
            np.zeros(aval.shape, jax.dtypes.float0)
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
            else jnp.zeros(aval.shape, aval.dtype)
            for aval in self.other_avals
        ]
        found = self.join_leaves(real, zeros, lambda re, im: jax.lax.complex(re, -im))
        leaves = [
            leaf if kind is Kind.OTHER else leaf.astype(aval.dtype)
            for leaf, aval, kind in zip(found, self.avals, self.kinds, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def flatten(self, real: Sequence[jax.Array], leading: int = 0) -> jax.Array:
        """All real numbers, of one leaf at least, as one vector, behind ``leading`` axes kept as they are."""
        return jnp.concatenate([jnp.reshape(leaf, (*leaf.shape[:leading], -1)) for leaf in real], axis=leading)

    def unflatten(self, vector: jax.Array, axis: int = -1) -> list[jax.Array]:
        """Cut one axis of length ``size`` into the real leaves' shapes; dtype stays."""
        axis %= vector.ndim
        parts = []
        for start, size, shape in zip(np.cumsum([0, *self.sizes]), self.sizes, self.shapes, strict=False):
            part = jax.lax.slice_in_dim(vector, int(start), int(start) + size, axis=axis)
            parts.append(jnp.reshape(part, (*vector.shape[:axis], *shape, *vector.shape[axis + 1 :])))
        return parts


def _kind(dtype: np.dtype) -> Kind:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return Kind.COMPLEX
    return Kind.REAL if jnp.issubdtype(dtype, jnp.floating) else Kind.OTHER


def real_dtype(dtype: np.dtype) -> np.dtype:
    """That of a complex number's parts."""
    return np.zeros(0, dtype).real.dtype


def float32_or_wider(*dtypes: np.dtype) -> np.dtype:
    """The smallest dtype that holds all of these, float32 at least, whatever promotion of dtypes the user has set."""
    return functools.reduce(np.promote_types, map(np.dtype, dtypes), np.dtype(np.float32))


def select_examples(where: jax.Array, values: PyTree, others: PyTree) -> PyTree:
    """Per example: ``values`` where true, ``others`` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(where.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), values, others)
