"""Arrays that a user gives: strongly typed, and of the shapes that belong together; else what to do about it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepeprop_jax.network.cell import Graph, Path, PyTree

LeafPath = tuple[Hashable, ...]


def path_name(path: LeafPath) -> str:
    """A pytree path as a/b/c."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the array itself)"


def as_arrays(tree: PyTree, what: str) -> PyTree:
    """Every leaf as an array of a dtype of its own.

    Python numbers and weakly typed arrays (``jnp.asarray(0.5)``, ``jnp.where(a, 1.0, 0.0)``) take the dtype that JAX
    gives them: a state that holds one is of another type than the state after it, and jit would compile twice.
    """
    check_leaves(tree, what)
    return jax.tree.map(strong, tree)


def as_avals(tree: PyTree, what: str) -> PyTree:
    """Shapes and dtypes of arrays, numbers or shapes."""
    check_leaves(tree, what)
    return jax.eval_shape(lambda leaves: leaves, tree)


def shapes_of(tree: PyTree, without_axes: int = 0) -> PyTree:
    """Shapes and dtypes of arrays and numbers, without their first axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[without_axes:], jnp.result_type(x)), tree)


def check_leaves(tree: PyTree, what: str) -> None:
    """Every leaf must be an array or a number, or have the shape and dtype of one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        is_array = dtype is not None and hasattr(leaf, "shape") and getattr(dtype, "kind", None) not in (*"OSUMm",)
        if not is_array and not hasattr(leaf, "__jax_array__") and not isinstance(leaf, int | float | complex):
            kind = type(leaf).__name__ if dtype is None else f"{type(leaf).__name__} of dtype {dtype}"
            raise TypeError(
                f"{what} at '{path_name(path)}' must be an array or a number, as every leaf; seen {kind}. Keep what is "
                f"neither out of the pytree: in the cell's closure, or as an attribute of its module."
            )


def strong(leaf: ArrayLike) -> jax.Array:
    """The same number, as an array whose type says so."""
    if isinstance(leaf, jax.Array) and not jax.typeof(leaf).weak_type:
        return leaf
    return jnp.asarray(leaf, jnp.result_type(leaf))


def check_nesting(graph: Graph, tree: PyTree, what: str) -> None:
    """A network's params or carry must be nested as its nodes are."""

    def visit(part: PyTree, path: Path) -> None:
        keys, kind, seen = graph.keys_at(path), type(part).__name__, ""
        if not keys:
            return
        if isinstance(keys[0], int):
            needed = f"a tuple of {len(keys)}, one entry per layer of the stack"
            if not isinstance(part, tuple) or len(part) != len(keys):
                seen = f"a {kind} of {len(part)}" if isinstance(part, tuple | list | dict) else f"a {kind}"
        else:
            needed = f"a dict with the nodes {sorted(map(str, keys))}"
            if not isinstance(part, Mapping) or set(part) != set(keys):
                seen = f"keys {sorted(map(str, part))}" if isinstance(part, Mapping) else f"a {kind}"
        if seen:
            where = f"{what} at '{'/'.join(map(str, path))}'" if path else what
            raise ValueError(f"{where} must be {needed}; seen {seen}. Are these the {what} of another network?")
        for key in keys:
            visit(part[key], (*path, key))

    visit(tree, ())


def leaf_avals(tree: PyTree) -> list[tuple[LeafPath, jax.ShapeDtypeStruct]]:
    """Path, shape and dtype of every leaf; numbers count as arrays."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(path, jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))) for path, leaf in flat]


def batch_size(carry: PyTree, x: PyTree, x_name: str = "x") -> int:
    """The leading axis that all leaves of carry and x share."""
    trees = ((x_name, x), ("carry", carry))
    shapes = {f"{what} at '{path_name(path)}'": aval.shape for what, tree in trees for path, aval in leaf_avals(tree)}
    if not jax.tree.leaves(x):
        raise ValueError(f"{x_name} has no arrays; the network's input needs a leading batch axis.")
    for name, shape in shapes.items():
        if not shape:
            raise ValueError(
                f"{name} is a scalar; every leaf needs a leading batch axis. Add one with jnp.full((batch,), leaf)."
            )
    first = next(iter(shapes.values()))[0]
    for name, shape in shapes.items():
        if shape[0] != first:
            raise ValueError(
                f"All leaves of carry and {x_name} share one leading batch axis; seen {first} in {x_name} and shape "
                f"{shape} in {name}. Initialise on ONE step of a batch of the size that you train with: "
                f"network.init and learner.init take xs[0] of xs (time, batch, ...)."
            )
    if first == 0:
        raise ValueError("The batch is empty (size 0); at least one example is needed.")
    return first


def check_same(seen: PyTree, needed: PyTree, what: str, remedy: str) -> None:
    """Structure, shapes and dtypes must agree."""
    a, b = jax.tree.structure(seen), jax.tree.structure(needed)
    if a != b:
        raise ValueError(f"{what} has another structure than needed: seen {a}, needed {b}. {remedy}")
    for (path, a), (_, b) in zip(leaf_avals(seen), leaf_avals(needed), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"{what} at '{path_name(path)}': seen {a.dtype}{list(a.shape)}, needed {b.dtype}{list(b.shape)}. "
                f"{remedy}"
            )


def warn_of_integers(node: str, params: PyTree, trainable: Sequence[bool]) -> None:
    """Integer params are constants, with a zero gradient: said once where nothing shows that it is meant."""
    for (path, aval), flag in zip(leaf_avals(params), trainable, strict=True):
        if flag and jnp.issubdtype(aval.dtype, jnp.integer):
            warnings.warn(
                f"Node '{node}': params at '{path_name(path)}' are {aval.dtype}{list(aval.shape)}: constants, with a "
                f"zero gradient. To train them, give them as floats; if they are meant to be constants, say so with "
                f"trainable=False for them, or keep them in the cell's closure.",
                stacklevel=2,
            )
