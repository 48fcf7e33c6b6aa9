"""Sequences laid out as Flax's RNNs take them: the batch before time, and a length for every example."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter, Signature

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.learner.checks import check_flag, check_flags, sequence_length
from deepeprop_jax.network.arguments import as_arrays, leaf_avals, path_name
from deepeprop_jax.network.cell import PyTree


def with_layouts(value_and_grad: Callable[..., Callable[..., PyTree]]) -> Callable[..., Callable[..., PyTree]]:
    """``value_and_grad`` with the option ``time_major``, whose ``run`` takes ``seq_lengths``.

    Args:
      value_and_grad: of a learner, or of BPTT; its ``run`` has xs, targets, resets and valid last, time first in each.
    """

    def over(loss_fn, *, time_major: bool = True, **options):
        check_flag("time_major", time_major)
        in_time = value_and_grad(loss_fn, **options)
        signature = _with_last(in_time, Parameter("seq_lengths", Parameter.POSITIONAL_OR_KEYWORD, default=None))

        def run(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            params, state, *sequence = given.args
            xs, *others = time_first(*sequence, time_major=time_major)
            (loss, end), grads = in_time(params, state, xs, *others)
            if options.get("has_aux", False) and not time_major:
                loss = loss[0], _with_batch_first(loss[1], jax.tree.leaves(xs)[0].shape[1])
            return (loss, end), grads

        return _like(run, in_time, signature)

    order = Parameter("time_major", Parameter.KEYWORD_ONLY, default=True)
    return _like(over, value_and_grad, _with_last(value_and_grad, order))


def time_first(
    xs: PyTree,
    targets: PyTree,
    resets: jax.Array | None = None,
    valid: jax.Array | None = None,
    seq_lengths: jax.Array | None = None,
    *,
    time_major: bool = True,
) -> tuple[PyTree, PyTree, jax.Array | None, jax.Array | None]:
    """xs, targets, resets and valid, (time, batch, ...), whatever the layout that they were given in.

    Raises:
      TypeError: xs that are no arrays.
      ValueError: an empty sequence; arrays that do not begin alike; both valid and seq_lengths; lengths out of range.
    """
    xs = as_arrays(xs, "xs")
    if not time_major:
        xs, targets, resets, valid = _with_time_first(xs, targets, resets, valid)
    sequence_length(xs, targets)
    if seq_lengths is not None:
        if valid is not None:
            raise ValueError("Give valid or seq_lengths, not both: seq_lengths stands for the first steps.")
        valid = _first_steps(seq_lengths, *jax.tree.leaves(xs)[0].shape[:2])
    return xs, targets, resets, valid


def _with_last(function: Callable[..., PyTree], more: Parameter) -> Signature:
    """A function's parameters, to which one is added."""
    own = inspect.signature(function)
    before = [part for part in own.parameters.values() if part.kind != Parameter.VAR_KEYWORD]
    behind = [part for part in own.parameters.values() if part.kind == Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*before, more, *behind])


def _like(function: Callable[..., PyTree], other: Callable[..., PyTree], signature: Signature) -> Callable[..., PyTree]:
    """``function`` with another one's name and text, for ``help``."""
    functools.update_wrapper(function, other)
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _with_time_first(xs: PyTree, targets: PyTree, *flags: jax.Array | None) -> tuple[PyTree, ...]:
    """Arrays (batch, time, ...) with their first two axes in the other order.

    Raises:
      ValueError: an array without these two axes, or with others than xs has.
    """
    lead: tuple[int, ...] | None = None
    for what, tree in (("xs", xs), ("targets", targets)):
        for path, aval in leaf_avals(tree):
            lead = lead or aval.shape[:2]
            if len(aval.shape) < 2 or aval.shape[:2] != lead:
                raise ValueError(
                    f"{what} at '{path_name(path)}' has shape {aval.shape}; with time_major=False all arrays of xs and "
                    f"targets begin with (batch, time), of xs {lead}. Repeat a target that all examples share."
                )
    for name, flag in zip(("resets", "valid"), flags, strict=True):
        if flag is not None and lead is not None:
            check_flags(flag, lead, f"With time_major=False {name}")
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (xs, targets, *flags))


def _with_batch_first(aux: PyTree, batch: int) -> PyTree:
    """Stacked aux, (time, batch, ...), as (batch, time, ...); of what is one number per step there is only (time,)."""

    def swap(path: tuple, leaf: jax.Array) -> jax.Array:
        if leaf.ndim > 1 and leaf.shape[1] != batch:
            raise ValueError(
                f"aux at '{path_name(path)}' has shape {leaf.shape[1:]} at every step; with time_major=False the first "
                f"axis of an aux is that of the {batch} examples. Give a number, or use time_major=True."
            )
        return leaf if leaf.ndim == 1 else jnp.swapaxes(leaf, 0, 1)

    return jax.tree_util.tree_map_with_path(swap, aux)


def _first_steps(seq_lengths: jax.Array, steps: int, batch: int) -> jax.Array:
    """(time, batch) bool: the first steps of every example."""
    needed = f"seq_lengths must be integers from 0 to {steps}, the steps of xs, of shape {(batch,)}"
    if not hasattr(seq_lengths, "shape") or not hasattr(seq_lengths, "dtype"):
        raise TypeError(f"{needed}; seen {type(seq_lengths).__name__}.")
    if not jnp.issubdtype(seq_lengths.dtype, jnp.integer) or seq_lengths.shape != (batch,):
        raise ValueError(f"{needed}; seen {seq_lengths.dtype} of shape {seq_lengths.shape}.")
    if not isinstance(seq_lengths, jax.core.Tracer):
        lengths = np.asarray(seq_lengths)
        if lengths.size and (lengths.min() < 0 or lengths.max() > steps):
            raise ValueError(f"{needed}; seen one of {lengths.min()} and one of {lengths.max()}.")
    return jnp.arange(steps, dtype=jnp.int32)[:, None] < jnp.asarray(seq_lengths).astype(jnp.int32)[None]
