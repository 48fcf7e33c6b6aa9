"""The reference of ``within_segment="exact"``: exact credit inside a segment, deep e-prop before it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.network.cell import Cell, PyTree, assemble, connect, graph_of, select
from deepeprop_jax.reference.backpropagation import Apply, LossFn, Pair, Run, reverse_mode
from deepeprop_jax.reference.stop_gradient import (
    distances,
    keep_rows,
    localised,
    part_of,
    real_leaves,
    unfold,
    whole_of,
)


def segment_oracle(
    network: Cell,
    loss_fn: LossFn,
    pairs: Sequence[Pair],
    *,
    segment_length: int,
    localise: bool = True,
    hops: int | None = None,
) -> Run:
    """The gradient of ``value_and_grad(..., segment_length=C, within_segment="exact")``, by plain reverse mode.

    For each segment: the loss of that segment alone, with localised cells before the segment's start and true cells
    inside it; the gradients are summed. With ``hops = m``, node k's parameters see every node more than m hops above k
    with ``stop_gradient`` on its incoming carry at every step before the segment, and on the carry that enters it.

    *Cost*: one pass of ``stop_gradient_oracle`` and one of BPTT per segment.

    Args:
      network: a cell or a network of cells.
      loss_fn: one step's loss on the batched output.
      pairs: F and g of each node, in the order of ``graph_of(network).nodes``.
      segment_length: C; the last segment may be shorter.
      localise: whether cells before a segment are localised (deep e-prop) or true (exact).
      hops: how far a parameter's temporal credit is carried before the segment; None: all the way.

    Returns:
      ``run(params, carry, xs, targets, resets=None, valid=None) -> ((loss, final_carry), grads)``.
    """
    graph = graph_of(network)
    layers, output = unfold(network, pairs)
    true = [layer.pair.apply for layer in layers]
    before = [localised(layer.pair) if localise else layer.pair.apply for layer in layers]

    def cut_apply(stopped: jax.Array) -> Apply:
        def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            x, inside, entering = x
            new: list[PyTree] = []
            outputs: dict[int, PyTree] = {}
            for node, layer in enumerate(layers):
                stop = stopped[node] & (~inside | entering)
                old = jax.tree.map(
                    lambda leaf, stop=stop: jnp.where(stop, lax.stop_gradient(leaf), leaf), part_of(carry, graph, layer)
                )
                arguments = (part_of(params, graph, layer), old, connect(layer.wire, x, outputs))
                carry_t, outputs[node] = jax.tree.map(
                    lambda a, b: jnp.where(inside, a, b), true[node](*arguments), before[node](*arguments)
                )
                new.append(carry_t)
            return whole_of(graph, layers, new, like=carry), connect(output, x, outputs)

        return apply

    def masked_loss(y: PyTree, target: tuple[PyTree, jax.Array]) -> jax.Array:
        return jnp.where(target[1], loss_fn(y, target[0]), 0)

    def run(params, carry, xs, targets, resets=None, valid=None):
        length, batch = jax.tree.leaves(xs)[0].shape[:2]
        recurrent = [bool(real_leaves(select(carry, graph.nodes[layer.vertex].path))) for layer in layers]
        distance = distances(layers, recurrent)
        far = (distance > (np.inf if hops is None else hops)) & np.isfinite(distance)
        distinct, source_row = np.unique(far, axis=0, return_inverse=True)
        source_row = source_row.reshape(-1)
        starts = jnp.arange(0, length, segment_length)
        step = jnp.arange(length)

        def gradient(case: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, PyTree], PyTree]:
            stopped, start = case
            inside, counted = step >= start, (step >= start) & (step < start + segment_length)
            flags = [jnp.broadcast_to(f[:, None], (length, batch)) for f in (inside, step == start)]
            steps = (xs, *flags)
            return reverse_mode(cut_apply(stopped), masked_loss)(
                params, carry, steps, (targets, counted), resets, valid
            )

        cases = (jnp.repeat(jnp.asarray(distinct), len(starts), axis=0), jnp.tile(starts, len(distinct)))
        (losses, ends), grads = lax.map(gradient, cases)
        per_set = jax.tree.map(lambda leaf: leaf.reshape(len(distinct), len(starts), *leaf.shape[1:]).sum(1), grads)
        kept = []
        for node, vertex in enumerate(graph.nodes):
            rows = np.array([row for layer, row in zip(layers, source_row, strict=True) if layer.vertex == node])
            kept.append(keep_rows(select(per_set, vertex.path), vertex, rows))
        grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(assemble(graph, kept)))
        return (losses[: len(starts)].sum(), jax.tree.map(lambda leaf: leaf[0], ends)), grads

    return run
