"""How many directions a projected carry needs: as many as bring its measured error below a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.learner.basis import with_basis
from deepeprop_jax.learner.carry_basis import carry_basis
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner
from deepeprop_jax.learner.error_meter import Meter, error_meter
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.report.table import table


class Measured(NamedTuple):
    """The relative error of a gradient against BPTT's, with R directions, and its standard error."""

    rank: int
    error: float
    uncertainty: float


class Suggestion(NamedTuple):
    """The result of ``suggest_rank``; prints as a table.

    Attributes:
      rank: the smallest R that was tried whose error is below the target; None if none is.
      measured: all that were tried.
      target: of the error.
    """

    rank: int | None
    measured: tuple[Measured, ...]
    target: float

    @property
    def helps(self) -> bool:
        """Whether the last R that was tried has a smaller error than the first, beyond what is uncertain."""
        first, last = self.measured[0], self.measured[-1]
        return last.error + 2 * (first.uncertainty + last.uncertainty) < first.error

    def __str__(self) -> str:
        rows = [[f"{m.rank}", f"{m.error:.3f}", f"{m.uncertainty:.3f}"] for m in self.measured]
        lines = table([("R", "error", "standard error"), *rows])
        if self.rank is not None:
            lines.append(f"carry_rank={self.rank} is enough for an error below {self.target:g}.")
        elif self.helps or len(self.measured) == 1:
            lines.append(f"None of these is enough for an error below {self.target:g}. Try more, or longer segments.")
        else:
            lines.append(f"More directions do not help here: no error is below {self.target:g}. Try longer segments.")
        return "\n".join(lines)


def suggest_rank(
    learner: OnlineLearner,
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    carry: PyTree,
    batches: Sequence[tuple[PyTree, PyTree]],
    *,
    segment_length: int,
    target: float = 0.1,
    key: jax.Array | None = None,
) -> Suggestion:
    """Try 1, 2, 4, ... directions at fixed parameters, until the error meter reads less than a target.

    The basis is learnt from all batches first, once for all R: its directions are sorted by what they carry, and the
    first R are kept. Then every batch gives one sample of the error of one node, for each R. Take parameters from some
    way into training: on an untrained network other directions matter. No BPTT; constant memory in the sequences'
    length.

    Args:
      learner: from ``deep_eprop(network, carry_rank=R)``, with the largest R to try.
      loss_fn: as for ``value_and_grad``, without aux.
      params, carry: of the network; every batch starts from this carry, (batch, ...).
      batches: ``(xs, targets)`` each, (time, batch, ...), all of one shape. Some 50 for each node tell the error to a
        tenth of itself.
      segment_length: C.
      target: of ‖ĝ − g‖ / ‖g‖.
      key: of pulls and probes; ``jax.random.key(0)`` if None.

    Raises:
      ValueError: a learner without ``carry_rank``; fewer batches than nodes with parameters.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from deepeprop_jax import deep_eprop, suggest_rank
    >>> learner = deep_eprop(nn.SimpleCell(features=4), carry_rank=4)
    >>> keys = jax.random.split(jax.random.key(0), 20)
    >>> batches = [(jax.random.normal(key, (8, 4, 2), jnp.float32), jnp.zeros(8)) for key in keys]
    >>> params, carry = learner.network.init(jax.random.key(1), batches[0][0][0])
    >>> loss_fn = lambda y, target: jnp.mean((y - target) ** 2)
    >>> suggest_rank(learner, loss_fn, params, carry, batches, segment_length=2, target=1e-3).rank
    4
    """
    if not batches:
        raise ValueError("batches has none; needed some (xs, targets), about 50 for each node of the network.")
    key = jax.random.key(0) if key is None else key
    basis_of = carry_basis(learner, loss_fn, segment_length=segment_length)
    meter_of = error_meter(learner, loss_fn, horizon=len(batches))
    run = learner.value_and_grad(loss_fn, segment_length=segment_length)
    x = jax.tree.map(lambda leaf: leaf[0], batches[0][0])
    state = learner.init(params, carry, x)
    basis, fresh = basis_of.init(key, params, carry, x), meter_of.init(key, params, carry, x)
    if len(batches) < len(fresh.counts):
        raise ValueError(f"{len(batches)} batches are too few for {len(fresh.counts)} nodes with parameters.")
    update = jax.jit(basis_of.update)
    for i, (xs, targets) in enumerate(batches):
        basis = update(basis, jax.random.fold_in(key, i), params, state, xs, targets)

    @jax.jit
    def one(meter: Meter, start: LearnerState, xs: PyTree, targets: PyTree) -> Meter:
        grads = run(params, start, xs, targets)[1]
        return meter_of.update(meter_of.begin(meter, params, carry, x), params, start, xs, targets, grads)

    measured: list[Measured] = []
    largest = len(basis.directions)
    for rank in [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest]:
        kept = (jnp.arange(largest) < rank)[:, None]  # a direction of zeros is none
        first = basis._replace(directions=jnp.where(kept, basis.directions, 0), lift=jnp.where(kept, basis.lift, 0))
        meter, start = fresh, with_basis(state, first)
        for xs, targets in batches:
            meter = one(meter, start, xs, targets)
        error = meter_of.error(meter)
        measured.append(Measured(rank, float(error.total), float(error.uncertainty)))
        if measured[-1].error < target:
            return Suggestion(rank, tuple(measured), target)
    return Suggestion(None, tuple(measured), target)
