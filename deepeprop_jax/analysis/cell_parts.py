"""A cell in two parts, F and g, as functions of real leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepeprop_jax.jaxpr.real_leaves import Parts, RealView

Reals = list[jax.Array]

Others = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]
"""The leaves that are no variables of differentiation, of (params, carry_tm1, input): see ``real_leaves.Parts``."""

Points = tuple[Reals, Reals]
"""Real leaves of (carry_t, carry_tm1)."""


class Views(NamedTuple):
    """A cell's pytrees as real leaves."""

    params: RealView
    carry: RealView
    input: RealView
    output: RealView


class Cut(NamedTuple):
    """A cell in two parts, for one example and real leaves.

    Both take ``point``: the carries once more, not differentiated by (see ``derived_carry.through_sources``).

    Attributes:
      next_carry_parts: F, ``(params, carry_tm1, input, others, point) -> carry_t``, with the other leaves.
      output_parts: g, ``(params, carry_t, carry_tm1, input, others, carry_t_other, point) -> y_t``, likewise; here
        ``point`` is the pair (carry_t, carry_tm1).
      output_uses: which of "params", "carry_tm1" and "input" g depends on beside h_t.
      output_rows: where y_t is made of carry components alone, their indices; None where g computes something.
    """

    next_carry_parts: Callable[..., Parts]
    output_parts: Callable[..., Parts]
    output_uses: frozenset[str]
    output_rows: np.ndarray | None

    def next_carry(self, p: Reals, h: Reals, u: Reals, others: Others, point: Reals) -> Reals:
        """F, real leaves alone."""
        return self.next_carry_parts(p, h, u, others, point).real

    def output_map(
        self, p: Reals, h_t: Reals, h: Reals, u: Reals, others: Others, h_t_other: Sequence[Any], point: Points
    ) -> Reals:
        """g, real leaves alone."""
        return self.output_parts(p, h_t, h, u, others, h_t_other, point).real
