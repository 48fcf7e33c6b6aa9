"""The last steps of a stream, whose carry is projected once in C of them.

A projection loses what is outside its R directions, so the fewer the better. The steps since the last one wait; the
gradient of a step goes back through them exactly, and on by the projected carry. It costs C steps back, and memory
stays constant. They are run again at the parameters of the last step: updates of them inside a window are seen as if
they had been made before it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.real_leaves import select_examples
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments.network import Segment, prepare
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.plan import Plan


class Window(NamedTuple):
    """The steps since the last projection.

    Attributes:
      params: of the last step.
      carry: before the first of them.
      xs: (C, batch, ...) their inputs.
      resets: (C, batch) whether an example was reset before a step.
      count: how many steps there are.
    """

    params: PyTree
    carry: PyTree
    xs: PyTree
    resets: jax.Array
    count: jax.Array

    @property
    def steps(self) -> int:
        """C."""
        return self.resets.shape[0]


def shapes(params: PyTree, carry: PyTree, x: PyTree, steps: int) -> Window:
    """Shapes and dtypes of a window, from those of one step."""
    xs = jax.tree.map(lambda leaf: leaf.update(shape=(steps, *leaf.shape)), x)
    resets = jax.ShapeDtypeStruct((steps, jax.tree.leaves(x)[0].shape[0]), np.dtype(bool))
    return Window(params, carry, xs, resets, jax.ShapeDtypeStruct((), np.dtype(np.int32)))


def run(plan: Plan, window: Window, initial: PyTree) -> Segment:
    """Its steps as a segment; those that are not there yet are not valid."""
    present = (jnp.arange(window.steps, dtype=window.count.dtype) < window.count)[:, None]
    flags = Flags(window.resets, jnp.broadcast_to(present, window.resets.shape))
    return Segment(prepare(plan, window.params), window.carry, initial, window.xs, flags)


def with_step(window: Window, params: PyTree, carry: PyTree, x: PyTree, active: jax.Array) -> Window:
    """With one step more; a full window begins anew.

    Args:
      params, carry, x: of the step.
      active: (batch,) whether an example's step before this one counts: it was not reset since.
    """
    full = window.count >= window.steps
    place = jnp.where(full, 0, window.count)
    start = jax.tree.map(lambda now, first: jnp.where(place == 0, now, first), carry, window.carry)
    resets = jnp.where(full, False, window.resets).at[place].set(~active & (place > 0))
    # Steps that are not there yet are run as well, without effect: on an input that there was, where slopes are finite.
    xs = jax.tree.map(lambda leaf, new: jnp.where(place == 0, new[None], leaf).at[place].set(new), window.xs, x)
    return Window(params, start, xs, resets, (place + 1).astype(window.count.dtype))


def without_examples(window: Window, where: jax.Array, initial: PyTree) -> Window:
    """For some examples, (batch,), a start from the initial carry and finite inputs: the steps count no more."""

    def finite(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        gone = where.reshape(1, -1, *(1,) * (leaf.ndim - 2)) & ~jnp.isfinite(leaf)
        return jnp.where(gone, 0, leaf)

    carry = select_examples(where, initial, window.carry)
    return window._replace(carry=carry, xs=jax.tree.map(finite, window.xs))


def emptied(window: Window, carry: PyTree) -> Window:
    """Without steps; the next one starts from ``carry``."""
    return window._replace(carry=carry, resets=jnp.zeros_like(window.resets), count=jnp.zeros_like(window.count))


def at_last(segment: Segment, tree: PyTree) -> PyTree:
    """Values of the last step that there is, with zeros for the other steps before and behind them."""
    steps, place = segment.sizes["c"], _last(segment)

    def spread(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jax.dtypes.float0:
            return np.zeros((steps, *leaf.shape), leaf.dtype)
        return jnp.zeros((steps, *leaf.shape), leaf.dtype).at[place].set(leaf)

    return jax.tree.map(spread, tree)


def resets_of(segment: Segment) -> jax.Array:
    """(batch,) whether an example was reset inside."""
    resets = segment.nodes[0].flags.resets
    assert resets is not None
    return resets.any(axis=0)


def _last(segment: Segment) -> jax.Array:
    valid = segment.nodes[0].flags.valid
    assert valid is not None
    return jnp.maximum(valid[:, 0].sum() - 1, 0)
