"""How far a learner's gradient is from backpropagation through time, on the user's own network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from deepeprop_jax.learner.basis import CarryBasis, with_basis
from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.learner.layout import time_first
from deepeprop_jax.learner.signals import Signal
from deepeprop_jax.network.arguments import as_arrays
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.reference import LossFn, bptt, is_differentiable, windowed_bptt
from deepeprop_jax.report.table import table
from deepeprop_jax.report.trace_error import trace_error


class Row(NamedTuple):
    """One parameter's gradient g beside that of BPTT, r.

    Attributes:
      path: where the parameter lies in params, e.g. ``0/params/hn/kernel``.
      cosine: ⟨g, r⟩ / (‖g‖ ‖r‖); nan where either is zero.
      relative_error: ‖g - r‖ / ‖r‖; where r is zero, nan if g is too and inf otherwise.
      norm_ratio: ‖g‖ / ‖r‖; where r is zero, nan if g is too and inf otherwise.
      norm: ‖r‖.
    """

    path: str
    cosine: float
    relative_error: float
    norm_ratio: float
    norm: float


class Comparison(NamedTuple):
    """The result of ``compare_to_bptt``; prints as a table.

    Attributes:
      rows: one ``Row`` per differentiable parameter leaf, in pytree order.
      total: the same figures for the whole gradient as one vector.
      trace_errors: with ``rank=R``, by trace what ``trace_error`` estimates at the sequence's end, the mean over
        examples.
    """

    rows: tuple[Row, ...]
    total: Row
    trace_errors: Mapping[str, float] = MappingProxyType({})

    def __str__(self) -> str:
        heads = ("parameter", "cosine", "relative error", "norm ratio", "norm of BPTT")
        shown = [[row.path, *map(_show, row[1:], (".4f", ".2e", ".4f", ".2e"))] for row in (*self.rows, self.total)]
        first, *lines, last = table([heads, *shown])
        rule = "-" * len(first)
        lost = [f"trace {name}: relative error {value:.2e} (estimate)" for name, value in self.trace_errors.items()]
        return "\n".join((first, rule, *lines, rule, last, *lost))


def compare_to_bptt(
    learner: OnlineLearner,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    targets: PyTree,
    loss_fn: LossFn,
    *,
    resets: jax.Array | None = None,
    valid: jax.Array | None = None,
    seq_lengths: jax.Array | None = None,
    segment_length: int | None = None,
    within_segment: str = "eprop",
    window: int | None = None,
    time_major: bool = True,
    basis: CarryBasis | None = None,
    signals: Mapping[str, Signal] | None = None,
) -> Comparison:
    """A learner's gradient beside that of BPTT through the same network, per parameter and for the whole.

    A parameter that ``trainable`` leaves out has a gradient of zero here, and counts so.

    *Cost*: one gradient of each; memory O(T) for BPTT.

    Args:
      learner: what ``deep_eprop`` returns.
      params: parameters of its network.
      carry: initial carry, leaves (batch, ...).
      xs: inputs, leaves (T, batch, ...).
      targets: any pytree with leading T.
      loss_fn: ``loss_fn(y_t, target_t)`` on the batched output of one step, a scalar or one number per example; with
        ``window`` on that of C steps.
      resets, valid, seq_lengths: as for ``learner.value_and_grad``'s ``run``.
      segment_length, within_segment, window, time_major, signals: as for ``learner.value_and_grad``.
      basis: of a projected carry, see ``with_basis``; None for the one that ``learner.init`` gives.

    Returns:
      A ``Comparison``: ``rows``, ``total``, and a table when printed ("-": undefined, as one of the two is zero).

    Raises:
      TypeError, ValueError: as ``learner.value_and_grad`` and its ``run``.
    """
    params, carry, xs = as_arrays(params, "params"), as_arrays(carry, "carry"), as_arrays(xs, "xs")
    sequence = time_first(xs, targets, resets, valid, seq_lengths, time_major=time_major)
    in_segments = learner.value_and_grad(
        loss_fn, segment_length=segment_length, within_segment=within_segment, signals=signals, window=window
    )
    state = learner.init(params, carry, jax.tree.map(lambda leaf: leaf[0], sequence[0]))
    state = state if basis is None else with_basis(state, basis)
    (_, end), grads = jax.jit(in_segments)(params, state, *sequence)
    network = learner.network
    through_time = bptt(network, loss_fn) if window is None else windowed_bptt(network, loss_fn, window)
    _, reference = jax.jit(through_time)(params, carry, *sequence)

    rows, seen, wanted = [], [], []
    for (path, r), g in zip(jax.tree.leaves_with_path(reference), jax.tree.leaves(grads), strict=True):
        if is_differentiable(r):
            seen.append(_real_vector(g))
            wanted.append(_real_vector(r))
            rows.append(_row(jax.tree_util.keystr(path, simple=True, separator="/") or "params", seen[-1], wanted[-1]))
    empty = [np.zeros(0)]
    total = _row("all", np.concatenate(seen or empty), np.concatenate(wanted or empty))
    return Comparison(tuple(rows), total, {name: float(error.mean()) for name, error in trace_error(end).items()})


def _real_vector(leaf: jax.Array) -> np.ndarray:
    """A leaf as one float64 vector; real and imaginary parts of a complex leaf in turn."""
    array = np.asarray(leaf)
    parts = (array.real, array.imag) if np.iscomplexobj(array) else (array,)
    return np.concatenate([part.astype(np.float64).ravel() for part in parts])


def _row(path: str, g: np.ndarray, r: np.ndarray) -> Row:
    norm_g, norm_r = float(np.linalg.norm(g)), float(np.linalg.norm(r))
    cosine = float(g @ r) / (norm_g * norm_r) if norm_g > 0 and norm_r > 0 else math.nan
    return Row(path, cosine, _ratio(float(np.linalg.norm(g - r)), norm_r), _ratio(norm_g, norm_r), norm_r)


def _ratio(value: float, reference: float) -> float:
    if reference > 0:
        return value / reference
    return math.inf if value > 0 else math.nan


def _show(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
