"""Eligibility traces of TD(lambda) over gradients: a decaying sum, begun anew with each episode."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepeprop_jax.network.arguments import LeafPath, path_name
from deepeprop_jax.network.cell import PyTree


class EligibilityTraceState(NamedTuple):
    """State of ``eligibility_trace``.

    Attributes:
      count: number of updates so far, at which a schedule is read.
      trace: z_{t-1}, in the structure of the gradients, float32 or wider. Leaves that are neither real nor complex
        numbers (integers, PRNG keys) have none.
    """

    count: jax.Array
    trace: PyTree


def eligibility_trace(decay: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """TD(lambda)'s eligibility trace of the gradients that come in, as an optax transform.

        z_t = decay · z_{t-1} + g_t        z_{-1} = 0        decay = γ λ

    γ is the discount, λ the trace's parameter; g_t the gradient, at step t alone, of the value v(s_t) or of log π(a_t).
    The TD error multiplies z_t outside, one step later, when it is known:

        δ_t = r_{t+1} + γ v(s_{t+1}) - v(s_t)        θ ← θ + α δ_t z_t

    *Episodes*: ``update(g_t, state, reset=...)`` with ``reset`` true where step t is the FIRST of an episode: there
    z_t = g_t, whatever was before (also if that was not finite). This is the convention of ``resets`` in
    ``learner.value_and_grad``. The last step of an episode has no reset: its z_t holds the whole episode and meets the
    last TD error, in which v(s_{t+1}) counts as 0.

    With a learner the gradient of a step already goes back through the network's own past (its parameters' influence
    on the carry); z adds up those gradients over the steps whose predictions a later reward corrects. Both are needed.

    *Shapes*: any. ``reset`` is one boolean for all, or one per example, (batch,), where every leaf has the batch as
    its first axis (per-example gradients); ``init`` then takes a tree shaped as those gradients.

    *Dtypes*: z is held in float32 or wider, and given in the gradient's dtype. Complex gradients keep their convention:
    with ``jax.grad``'s, conjugate before or after, as decay is real. Leaves of integers or PRNG keys, whose gradient is
    no real number, go through as they come.

    *Cost*: one copy of the gradients; two operations per number and step.

    Args:
      decay: γ λ, from 0 to 1; or a schedule, a function of the number of updates before this one.

    Returns:
      A transform with the extra argument ``reset`` (None: never), also inside ``optax.chain``.

    Raises:
      TypeError: decay is neither a real number nor a function; ``reset`` is not boolean.
      ValueError: decay below 0, above 1 or not a number; a leaf without a leading axis that fits ``reset``; gradients
        of another structure or shape than ``init`` saw.

    Reference: R. S. Sutton and A. G. Barto, "Reinforcement Learning: An Introduction", 2nd edition, 2018: eq. 12.5 to
    12.7, and the actor-critic with eligibility traces, sections 13.5 (episodes) and 13.6 (without an end).

    >>> trace = eligibility_trace(0.9 * 0.8)
    >>> state = trace.init({"w": jnp.zeros(2)})
    >>> z, state = trace.update({"w": jnp.array([1.0, 0.0])}, state)
    >>> z, state = trace.update({"w": jnp.array([0.0, 1.0])}, state)
    >>> z["w"].round(2).tolist()
    [0.72, 1.0]
    >>> z, state = trace.update({"w": jnp.array([0.0, 1.0])}, state, reset=True)  # the first step of a new episode
    >>> z["w"].tolist()
    [0.0, 1.0]
    """
    _check_decay(decay)

    def init(params: PyTree) -> EligibilityTraceState:
        return EligibilityTraceState(jnp.zeros((), jnp.int32), jax.tree.map(_first_trace, params))

    def update(
        updates: PyTree,
        state: EligibilityTraceState,
        params: PyTree | None = None,
        *,
        reset: jax.typing.ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[PyTree, EligibilityTraceState]:
        del params, extra
        _check_structure(updates, state.trace)
        begins = None if reset is None else _flags(reset)
        factor = decay(state.count) if callable(decay) else decay

        def one(path: LeafPath, gradient: Any, trace_tm1: Any) -> Any:
            if _has_no_trace(trace_tm1):
                _check_other(path, gradient)
                return trace_tm1
            _check_leaf(path, gradient, trace_tm1, begins)
            kept = jnp.asarray(factor, trace_tm1.dtype) * trace_tm1
            if begins is not None:
                kept = jnp.where(begins.reshape(begins.shape + (1,) * (kept.ndim - begins.ndim)), 0, kept)
            return kept + gradient.astype(kept.dtype)

        trace_t = jax.tree_util.tree_map_with_path(one, updates, state.trace, is_leaf=_has_no_trace)
        given = jax.tree.map(_as_gradient, updates, trace_t, is_leaf=_has_no_trace)
        return given, EligibilityTraceState(optax.safe_increment(state.count), trace_t)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_decay(decay: optax.ScalarOrSchedule) -> None:
    if callable(decay) or isinstance(decay, jax.core.Tracer):
        return
    number = isinstance(decay, Real) or (hasattr(decay, "dtype") and jnp.issubdtype(decay.dtype, jnp.floating))
    if isinstance(decay, bool) or not number or jnp.ndim(decay):
        raise TypeError(
            f"decay must be a real number, gamma times lambda, or a schedule (a function of the number of updates); "
            f"seen {decay!r}."
        )
    if not 0 <= float(decay) <= 1 or math.isnan(float(decay)):
        raise ValueError(f"decay is gamma times lambda, from 0 to 1; seen {float(decay)}.")


def _has_no_trace(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _first_trace(leaf: Any) -> jax.Array | optax.MaskedNode:
    if not hasattr(leaf, "dtype"):
        leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return optax.MaskedNode()
    return jnp.zeros(leaf.shape, leaf.dtype if jnp.finfo(leaf.dtype).bits >= 32 else jnp.float32)


def _flags(reset: jax.typing.ArrayLike) -> jax.Array:
    flags = jnp.asarray(reset)
    if flags.dtype != bool:
        raise TypeError(
            f"reset says where an episode begins: booleans, one for all or one per example; seen {flags.dtype}. "
            f"Write reset=(flags > 0)."
        )
    if flags.ndim > 1:
        raise ValueError(f"reset is one boolean, or one per example, (batch,); seen the shape {flags.shape}.")
    return flags


def _check_structure(updates: PyTree, trace: PyTree) -> None:
    seen, needed = (jax.tree.structure(tree, is_leaf=_has_no_trace) for tree in (updates, trace))
    if seen != needed:
        raise ValueError(
            f"The gradients' structure is not the one that init saw: seen {seen}, needed {needed}. Call init with a "
            f"tree shaped as the gradients, and keep one state per gradient."
        )


def _check_leaf(path: LeafPath, gradient: Any, trace: jax.Array, begins: jax.Array | None) -> None:
    where = f"The gradient at '{path_name(path)}'"
    if gradient.shape != trace.shape:
        raise ValueError(
            f"{where}: seen the shape {gradient.shape}, needed {trace.shape}, as init saw it. Per-example gradients "
            f"need an init by a tree with their batch axis."
        )
    if jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(trace):
        raise ValueError(f"{where} is complex; init saw a real leaf. Call init with a tree of the gradients' dtypes.")
    if begins is not None and begins.ndim == 1 and trace.shape[:1] != begins.shape:
        raise ValueError(
            f"{where}: reset has one boolean for each of {begins.shape[0]} examples, so the leaf's first axis must be "
            f"the batch of {begins.shape[0]}; seen the shape {trace.shape}. Give per-example gradients, or one boolean."
        )


def _check_other(path: LeafPath, gradient: Any) -> None:
    if not _has_no_trace(gradient) and jnp.issubdtype(gradient.dtype, jnp.inexact):
        raise ValueError(
            f"The gradient at '{path_name(path)}' is {gradient.dtype}; init saw a leaf of integers or keys there, "
            f"which has no trace. Call init with a tree of the gradients' dtypes."
        )


def _as_gradient(gradient: Any, trace: Any) -> Any:
    return gradient if _has_no_trace(trace) else trace.astype(gradient.dtype)
