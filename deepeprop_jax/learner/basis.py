"""What a basis of a projected carry is, and how a state takes one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepeprop_jax.learner.contract import LearnerState
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.traces import projected


class CarryBasis(NamedTuple):
    """A basis of a projected carry, and what it is learnt from. A pytree: it goes through jit, vmap and checkpoints.

    N counts the real numbers of the carry of one example: node by node from below, the leaves of each in pytree order,
    a complex leaf as its real part and then its imaginary part, without leaves that follow from others (spikes). Of
    large N a moment, (N, N), is a sketch, (m, N), see ``second_moments``.

    Attributes:
      directions, lift: (R, N) Uᵀ and Aᵀ: an influence S is kept as A Uᵀ S.
      weights: (N,), or (m,), how much each direction of the whole space would carry, sorted; the first R are kept.
      signals: (J, N, N) Σ_j, second moments of the cotangents that arrive in the carry from 1 / (1 - g_j) segments
        ahead or less, each of trace one.
      tangents: (N, N) Σs, second moments of what a random change of the parameters makes of the carry, of trace one.
      updates: () how many there were.
    """

    directions: jax.Array
    lift: jax.Array
    weights: jax.Array
    signals: jax.Array
    tangents: jax.Array
    updates: jax.Array


class Observed(NamedTuple):
    """What one sequence has shown so far of where a carry's influences and cotangents point. A pytree.

    J counts horizons, N the carry's numbers. Sums are over boundaries between segments. Moments are held as those of a
    ``CarryBasis``.

    Attributes:
      key: of the probe and of the pulls.
      roots: (J, N, N), or (J, N, m), square roots of the signals' moments before the sequence.
      turn: () which horizon the first example of the first boundary serves.
      tangent: what a random change of the parameters has made of the carry, shaped as the carry.
      mean: (N,) of the tangents of a batch of one so far.
      boundaries: () how many there were.
      own, tangents: (N, N) sums of the moments of the cotangents of a segment's own losses, and of tangents.
      pulled: (J, N, N) sums of those of pulled cotangents.
    """

    key: jax.Array
    roots: jax.Array
    turn: jax.Array
    tangent: PyTree
    mean: jax.Array
    boundaries: jax.Array
    own: jax.Array
    pulled: jax.Array
    tangents: jax.Array


class InitBasis(Protocol):
    """A random orthonormal basis, and moments that know nothing yet.

    Args:
      key: from ``jax.random.key``.
      params, carry, x: as given to ``learner.init``.
    """

    def __call__(self, key: jax.Array, params: PyTree, carry: PyTree, x: PyTree) -> CarryBasis: ...


class UpdateBasis(Protocol):
    """Run a sequence, collect moments at every boundary between segments, and choose the directions anew.

    Once in four calls of ``value_and_grad`` is enough.

    *Cost*: forward, one pull of two cotangents back to the carries, one tangent; no parameter's gradient. (J + 1)
    eigenvalue problems and one singular value decomposition of N x N, once a call.

    Args:
      basis: the one before.
      key: another one for every call.
      params, state, xs, targets, resets, valid: as given to ``value_and_grad``'s ``run``; of the state its carry alone.
    """

    def __call__(
        self,
        basis: CarryBasis,
        key: jax.Array,
        params: PyTree,
        state: LearnerState,
        xs: PyTree,
        targets: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> CarryBasis: ...


class BeginToObserve(Protocol):
    """Before a sequence that comes in pieces, with updates of the parameters between them.

    Args:
      basis: of now.
      key: another one for every sequence.
      carry: before the first piece, with its batch axis.
    """

    def __call__(self, basis: CarryBasis, key: jax.Array, carry: PyTree) -> Observed: ...


class Observe(Protocol):
    """Run a piece of a sequence, and collect moments where its segments begin.

    *Cost*: as ``update``, without eigenvalue problems.

    Args:
      observed: up to the piece.
      params, state, xs, targets, resets, valid: as given to ``value_and_grad``'s ``run``, so from before the piece; of
        the state its carry alone. A piece is a whole number of segments, but for the last.
    """

    def __call__(
        self,
        observed: Observed,
        params: PyTree,
        state: LearnerState,
        xs: PyTree,
        targets: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> Observed: ...


class Choose(Protocol):
    """After a sequence: its moments into the running ones, and the directions anew.

    *Cost*: as ``update``'s eigenvalue problems and singular value decomposition.

    Args:
      basis: as given to ``begin``.
      observed: of all pieces. Where nothing was observed, moments stay.
    """

    def __call__(self, basis: CarryBasis, observed: Observed) -> CarryBasis: ...


class BasisLearner(NamedTuple):
    """What ``carry_basis`` returns: pure functions. ``update`` is ``begin``, one ``observe`` and ``choose``.

    Attributes:
      init: ``init(key, params, carry, x) -> basis``.
      update: ``update(basis, key, params, state, xs, targets) -> basis``, from a whole sequence.
      begin: ``begin(basis, key, carry) -> observed``.
      observe: ``observe(observed, params, state, xs, targets) -> observed``, once for every piece of a sequence.
      choose: ``choose(basis, observed) -> basis``, at its end.
    """

    init: InitBasis
    update: UpdateBasis
    begin: BeginToObserve
    observe: Observe
    choose: Choose


def with_basis(state: LearnerState, basis: CarryBasis) -> LearnerState:
    """The state whose carry is projected along another basis from its next segment, or step, on.

    What the state holds stays as it is, with the lift that belongs to it, until then.

    Args:
      state: of a learner with ``carry_rank=R``.
      basis: from ``carry_basis``, or anything with ``directions`` and ``lift``, (R, N).

    Raises:
      TypeError: no state; no basis.
      ValueError: a state without a projected carry; arrays of another shape.
    """
    if not isinstance(state, LearnerState):
        raise TypeError(f"with_basis takes a learner's state, then a basis; seen {type(state).__name__}.")
    if not hasattr(basis, "directions") or not hasattr(basis, "lift"):
        raise TypeError(f"A basis has directions and lift, as a CarryBasis does; seen {type(basis).__name__}.")
    if projected.NAME not in state.traces:
        raise ValueError(
            "The state has no projected carry; make it with a learner of deep_eprop(network, carry_rank=R)."
        )
    held = state.traces[projected.NAME]
    for name in ("directions", "lift"):
        seen, needed = jnp.shape(getattr(basis, name)), getattr(held, name).shape
        if seen != needed:
            raise ValueError(f"{name} must have shape (R, N) = {needed}; seen {seen}.")
    own = [jnp.array(part, held.lift.dtype, copy=True) for part in (basis.directions, basis.lift)]  # may be donated
    new = held._replace(directions=own[0], lift=own[1])
    return state._replace(traces=state.traces | {projected.NAME: new})
