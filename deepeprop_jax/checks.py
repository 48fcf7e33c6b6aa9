"""What a user can get wrong in a call, told at trace time: what was seen, what is needed, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.cell import Graph, PyTree


def path_name(path: Any) -> str:
    """A pytree path as a/b/c."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the array itself)"


def check_nesting(graph: Graph, tree: PyTree, what: str) -> None:
    """A network's params or carry must be nested as its nodes are."""

    def visit(part: PyTree, prefix: tuple[int | str, ...]) -> None:
        keys = list(
            dict.fromkeys(v.path[len(prefix)] for v in graph.nodes if v.path[: len(prefix)] == prefix != v.path)
        )
        if not keys:
            return
        where = f"{what} at '{'/'.join(map(str, prefix))}'" if prefix else what
        if isinstance(keys[0], int):
            if not isinstance(part, tuple) or len(part) != len(keys):
                seen = f"a {type(part).__name__}" + (
                    f" of {len(part)}" if isinstance(part, tuple | list | dict) else ""
                )
                raise ValueError(
                    f"{where} must be a tuple of {len(keys)}, one entry per layer of the stack; seen {seen}. "
                    f"Are these the {what} of another network?"
                )
        elif not isinstance(part, Mapping) or set(part) != set(keys):
            seen = f"keys {sorted(map(str, part))}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
            raise ValueError(
                f"{where} must be a dict with the nodes {sorted(keys)}; seen {seen}. "
                f"Are these the {what} of another network?"
            )
        for key in keys:
            visit(part[key], (*prefix, key))

    visit(tree, ())


def leaf_avals(tree: PyTree) -> list[tuple[Any, jax.ShapeDtypeStruct]]:
    """Path, shape and dtype of every leaf; numbers count as arrays."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(path, jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))) for path, leaf in flat]


def batch_size(carry: PyTree, x: PyTree, x_name: str = "x") -> int:
    """The leading axis that all leaves of carry and x share."""
    sizes: dict[str, tuple[int, ...]] = {}
    for what, tree in (("carry", carry), (x_name, x)):
        for path, aval in leaf_avals(tree):
            sizes[f"{what} at '{path_name(path)}'"] = aval.shape
    if not leaf_avals(x):
        raise ValueError(f"{x_name} has no arrays; the network's input needs a leading batch axis.")
    for name, shape in sizes.items():
        if not shape:
            raise ValueError(f"{name} is a scalar; every leaf needs a leading batch axis. Add one with leaf[None].")
    first = next(iter(leaf_avals(x)))[1].shape[0]
    for name, shape in sizes.items():
        if shape[0] != first:
            raise ValueError(
                f"All leaves of carry and {x_name} share one leading batch axis; seen {first} in {x_name} and shape "
                f"{shape} in {name}. Initialise the network on a batch of the size that you train with."
            )
    if first == 0:
        raise ValueError("The batch is empty (size 0); at least one example is needed.")
    return first


def check_same(seen: PyTree, needed: PyTree, what: str, remedy: str) -> None:
    """Structure, shapes and dtypes must agree."""
    structures = jax.tree.structure(seen), jax.tree.structure(needed)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{what} has another structure than needed: seen {structures[0]}, needed {structures[1]}. {remedy}"
        )
    for (path, a), (_, b) in zip(leaf_avals(seen), leaf_avals(needed), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"{what} at '{path_name(path)}': seen {a.dtype}{list(a.shape)}, needed {b.dtype}{list(b.shape)}. "
                f"{remedy}"
            )


def sequence_length(xs: PyTree, targets: PyTree) -> int:
    """The leading time axis that all leaves of xs and targets share."""
    inputs = leaf_avals(xs)
    if not inputs:
        raise ValueError("xs has no arrays; it needs shape (time, batch, ...).")
    for path, aval in inputs:
        if len(aval.shape) < 2:
            raise ValueError(
                f"xs at '{path_name(path)}' has shape {aval.shape}; needed (time, batch, ...). For a single step use "
                f"learner.step, or xs[None]."
            )
    length = inputs[0][1].shape[0]
    if length == 0:
        raise ValueError("xs is an empty sequence (time axis of length 0); at least one step is needed.")
    wanted = leaf_avals(targets)
    if not wanted:
        raise ValueError(
            "targets has no arrays. loss_fn(y_t, target_t) gets one target a step; if yours uses none, "
            "pass jnp.zeros(T)."
        )
    for what, leaves in (("xs", inputs), ("targets", wanted)):
        for path, aval in leaves:
            if aval.shape[:1] != (length,):
                raise ValueError(
                    f"{what} at '{path_name(path)}' has shape {aval.shape}, but xs has {length} steps. Time is the "
                    f"first axis of xs and targets, with one entry a step; mask steps without a loss by weights in "
                    f"targets."
                )
    return length


def check_flags(flags: Any, shape: tuple[int, ...], what: str) -> jax.Array:
    """A boolean array of a given shape."""
    if not hasattr(flags, "shape") or not hasattr(flags, "dtype"):
        raise TypeError(f"{what} must be a boolean array of shape {shape}; seen {type(flags).__name__}.")
    if flags.dtype != jnp.bool_ or flags.shape != shape:
        raise ValueError(f"{what} must be a boolean array of shape {shape}; seen {flags.dtype} of shape {flags.shape}.")
    return jnp.asarray(flags)


def check_options(exact: Any, hops: Any, rank: Any) -> None:
    """The options of ``deep_eprop``."""
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be True or False; seen {exact!r}.")
    if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int)):
        raise TypeError(f"hops must be None (all) or an integer >= 0; seen {hops!r}.")
    if hops is not None and hops < 0:
        raise ValueError(
            f"hops must be None (all) or >= 0, the recurrent layers a trace is carried upward; seen {hops}."
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank must be None (whole traces) or an integer >= 1; seen {rank!r}.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be None (whole traces) or >= 1, the directions that a trace keeps; seen {rank}.")


def check_loss(loss: Any, has_aux: bool, batch: int) -> None:
    """What ``loss_fn`` returned, as shapes."""
    if has_aux:
        if not isinstance(loss, tuple) or len(loss) != 2:
            raise ValueError(f"With has_aux=True loss_fn must return (loss, aux); seen {type(loss).__name__}.")
        loss = loss[0]
    if not hasattr(loss, "shape"):
        hint = " For (loss, aux) pass has_aux=True." if isinstance(loss, tuple) else ""
        raise ValueError(f"loss_fn must return one array; seen {type(loss).__name__}.{hint}")
    if loss.shape not in ((), (batch,)) or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a real scalar for one step's batched output, or one loss per example, of shape "
            f"({batch},), which are summed; seen {loss.dtype}{list(loss.shape)}. Sum or average other axes inside it."
        )


def check_cotangent(dy: PyTree, y: PyTree) -> PyTree:
    """A cotangent shaped as the output y, cast to its dtypes; what belongs to integer outputs is not looked at."""
    if jax.tree.structure(dy) != jax.tree.structure(y):
        raise ValueError(
            f"dy = dL_t/dy_t must have the structure of the output y_t: seen {jax.tree.structure(dy)}, needed "
            f"{jax.tree.structure(y)}."
        )

    def check(path: Any, d: Any, leaf: jax.Array) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        d = jnp.asarray(d)
        if d.shape != leaf.shape or (jnp.iscomplexobj(d) and not jnp.iscomplexobj(leaf)):
            raise ValueError(
                f"dy at '{path_name(path)}': seen {d.dtype}{list(d.shape)}, needed {leaf.dtype}{list(leaf.shape)}, the "
                f"batched output of the last step."
            )
        return d.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(check, dy, y)


def check_segments(segment_length: int | None, within_segment: str) -> None:
    """Options of ``value_and_grad``."""
    if segment_length is not None and (isinstance(segment_length, bool) or not isinstance(segment_length, int)):
        raise TypeError(f"segment_length must be None or an integer; seen {type(segment_length).__name__}.")
    if segment_length is not None and segment_length < 1:
        raise ValueError(f"segment_length counts steps, so it must be at least 1; seen {segment_length}.")
    if within_segment not in ("eprop", "exact"):
        raise ValueError(f'within_segment must be "eprop" or "exact"; seen {within_segment!r}.')
    if within_segment == "exact" and segment_length is None:
        raise ValueError(
            "within_segment='exact' needs a segment_length, because the gradient depends on it: longer segments come "
            "closer to BPTT."
        )


def check_depth_hops(graph: Graph, hops: int | None, what: str) -> None:
    """Segments of a ``stack(cell, depth=L)`` are built for all hops and for none."""
    deep = [vertex.name for vertex in graph.nodes if vertex.depth is not None]
    if deep and hops:
        raise ValueError(
            f"{what} with hops={hops} is not available for a stack(cell, depth=L); seen at node '{deep[0]}'. Take "
            f"hops=None or hops=0, or write its layers out as stack(*[cell] * L)."
        )
