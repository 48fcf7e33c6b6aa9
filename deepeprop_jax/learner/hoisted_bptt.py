"""Backpropagation through time by the learner's own segments: every weight's work is hoisted out of the loop."""

from __future__ import annotations

from collections.abc import Callable

import jax

from deepeprop_jax.jaxpr.mesh_axes import summed_like, vary_alike
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.by_segments import by_segments
from deepeprop_jax.learner.layout import with_layouts
from deepeprop_jax.learner.planner import Planner
from deepeprop_jax.learner.sequence import Stream, make_sequence
from deepeprop_jax.learner.sharded import sequences_over_batches
from deepeprop_jax.network.arguments import as_arrays
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import PyTree, graph_of
from deepeprop_jax.traces.plan import Mode


def hoisted_bptt(network: object) -> Callable[..., PyTree]:
    """BPTT as the segment engine runs it: one segment, exact, without traces. The gradient is that of ``jax.grad``.

    ``jax.grad`` through ``lax.scan`` adds to a gradient of the size of the weights at every step. Here the loop
    over time holds only what depends on the carry, node by node, and every weight's gradient is one matrix product over
    all steps and examples. It is the honest baseline for anything that claims the speed of BPTT.

    *Cost*: memory O(T), as BPTT. Where there is little to hoist (LRU, ALIF) it is slower than ``jax.grad``, as it goes
    through arrays of the whole sequence several times.

    Args:
      network: as ``deep_eprop`` takes it.

    Returns:
      ``value_and_grad(loss_fn, *, has_aux=False, time_major=True)``, which returns
      ``run(params, carry, xs, targets, resets=None, valid=None, seq_lengths=None) -> ((loss, carry), grads)``.

    Raises:
      TypeError: something that is not a network; loss_fn is no function.
      ValueError, TypeError: in ``run`` as a learner's ``value_and_grad(loss_fn)``.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from deepeprop_jax import hoisted_bptt, stack
    >>> network = stack(nn.GRUCell(features=4), nn.Dense(2))
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = network.init(jax.random.key(0), xs[0])
    >>> loss_fn = lambda y, target: jnp.mean((y - target) ** 2)
    >>> (loss, carry), grads = hoisted_bptt(network)(loss_fn)(params, carry, xs, jnp.zeros(6))
    """
    cell = as_cell(network)
    planner = Planner(graph_of(cell), Mode(exact=True, hops=0))

    def value_and_grad(loss_fn: Callable[..., PyTree], *, has_aux: bool = False) -> Callable[..., PyTree]:
        """Turn ``loss_fn(y_t, target_t) -> loss``, or ``(loss, aux)``, into a function that runs a sequence."""
        checks.check_sequence_options(loss_fn)

        def run(params, carry, xs, targets, resets=None, valid=None):
            """Run a sequence: its loss, the sum over steps, and the gradient of that by BPTT.

            All is as in ``run`` of a learner's ``value_and_grad(loss_fn)``, but for the carry, (batch, ...), in place
            of the state: where the sequence starts, and what resets return to.
            """
            given, carry, xs = as_arrays(params, "params"), as_arrays(carry, "carry"), as_arrays(xs, "xs")
            length = checks.sequence_length(xs, targets)
            params, carry, xs, targets, resets, valid = vary_alike(given, carry, xs, targets, resets, valid)
            plan = planner.plan(params, carry, jax.tree.map(lambda leaf: leaf[0], xs))
            sequence = make_sequence(plan, loss_fn, has_aux, carry, xs, targets, resets, valid)
            (loss, end), grads = by_segments(params, Stream(carry, {}), sequence, length, exact=True)
            return (loss, checks.next_state(end.carry, carry)), summed_like(grads, given)

        return run

    return with_layouts(sequences_over_batches(value_and_grad, cell, object, lambda carry, split: split.spec()))
