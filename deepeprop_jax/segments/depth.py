"""``stack(cell, depth=L)`` over the C steps of a segment: ``NodeSegment`` under one ``lax.scan`` over its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.analysis.computed import parameter_values
from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, broadcast
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import Parts, PyTree
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.through_time import (
    Flags,
    Past,
    Run,
    leading_sizes,
    run_forward,
    with_inputs,
    without_cut_off_steps,
)


class DeepBack(NamedTuple):
    """``node.Back`` of all layers.

    Attributes:
      start: per real leaf of the carry, (L, [r,] batch, ...) the cotangent at the segment's start; empty where the past
        is cut off.
      params: per real parameter leaf, (L, ...) what the steps of the segment add.
      rows: instead, where every row and example is kept, (L, batch, r, all parameter entries).
      input: cotangent of the lowest layer's input at every step.
    """

    start: list[jax.Array]
    params: list[jax.Array]
    rows: jax.Array | None
    input: Leaves


class LayerEnd(NamedTuple):
    """Cotangents of the last carries of all layers, or of one layer alone.

    Attributes:
      leaves: per real leaf of the carry, (L, axis, ...).
      layer: the one layer; nothing is pulled back through those above it. None for all.
      axis: "r" or "b".
    """

    leaves: list[jax.Array]
    layer: jax.Array | None
    axis: str = "r"


class DeepSegment:
    """A node with depth that has run through a segment.

    Args:
      node: one layer, after analysis.
      params: (L, ...).
      start, initial: (L, batch, ...) the carry before the segment, and what a reset returns to.
      inputs: (C, batch, ...) of the lowest layer.
      flags: (C, batch).

    Attributes:
      carry_end: (L, batch, ...).
      outputs: (C, batch, ...) of the highest layer.
    """

    def __init__(
        self, node: Node, params: Parts, start: Parts, initial: Parts, inputs: Parts, flags: Flags, depth: int
    ):
        self.node, self.flags, self.depth = node, flags, depth
        self.params = params
        self.sizes = dict(zip("cb", leading_sizes(inputs), strict=True))

        def body(u: Parts, layer: tuple[Parts, Parts, Parts]) -> tuple[Parts, tuple[Parts, Run]]:
            params, start, initial = layer
            values = with_inputs(node.program, parameter_values(node.program, params), u)
            run = run_forward(node.program, values, start, initial, u, flags)
            part = NodeSegment(node, params, values, run, u, flags, slots_wanted=False)
            # Outputs of a layer are shaped as its inputs.
            return self.node.input.split(self.node.output.join(*part.outputs)), (u, run)

        top, (self._inputs, self._runs) = lax.scan(body, inputs, (params, start, initial), depth)
        self.carry_end = self._runs.carry_end
        self.outputs = self.node.output.split(self.node.input.join(*top))

    def after_resets(self) -> DeepSegment:
        """``NodeSegment.after_resets`` of all layers."""
        resets = self.flags.resets
        if resets is None:
            return self
        seen = copy.copy(self)
        seen._runs, seen._inputs = jax.vmap(partial(without_cut_off_steps, resets))(self._runs, self._inputs)
        return seen

    def over_layers(
        self,
        body: Callable[[PyTree, NodeSegment, PyTree], tuple[PyTree, PyTree]],
        start: PyTree,
        others: PyTree,
        top: jax.Array | None = None,
        upward: bool = False,
    ) -> tuple[PyTree, PyTree]:
        """``lax.scan`` from the highest layer to the lowest: ``body(carry, layer, slice of others)``.

        Args:
          upward: from the lowest to the highest instead.
          top: layers above it are not run, and give zeros; None for all.
        """
        node = self.node

        def run(carry: PyTree, params: Parts, u: Parts, layer_run: Run, other: PyTree) -> tuple[PyTree, PyTree]:
            values = with_inputs(node.program, parameter_values(node.program, params), u)
            part = NodeSegment(node, params, values, layer_run, u, self.flags, slots_wanted=False)
            return body(carry, part, other)

        def with_layer(carry: PyTree, slices: tuple[jax.Array, PyTree]) -> tuple[PyTree, PyTree]:
            index, layer = slices
            if top is None:
                return run(carry, *layer)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, carry, *layer))
            nothing = vary_like(nothing, self._runs)
            return lax.cond(index <= top, lambda: run(carry, *layer), lambda: nothing)

        layers = (jnp.arange(self.depth), (self.params, self._inputs, self._runs, others))
        return lax.scan(with_layer, start, layers, self.depth, reverse=not upward)

    def back(
        self, recurrence: Past, output: Leaves, end: LayerEnd | None, sizes: dict[str, int], keep: str, climb: range
    ) -> DeepBack:
        """Pull cotangents of the highest layer's output and of all last carries back through all layers and steps.

        Args:
          recurrence: as for ``NodeSegment.back``.
          output: per real leaf of the output, its cotangent at every step; empty for zero.
          end: where nothing arrives from above; None for zero.
          sizes: of the axes.
          keep: the axes that the parameters' cotangents keep, "" or "rb".
          climb: the layers whose cotangents go down after they have gone through their time; the others hand down
            only what their output owes to its own step, and ``recurrence`` is for their own parameters.
        """
        axes = "crb" if "r" in keep else "cb"
        kept_axes = axes[1:]
        view = self.node.output

        def full(ct: Leaves) -> list[jax.Array]:
            zeros = [Lifted(jnp.zeros(shape, dtype)) for shape, dtype in zip(view.shapes, view.dtypes, strict=True)]
            pairs = zip(ct or [None] * len(zeros), zeros, strict=True)
            full = [broadcast(zero if x is None else x, axes, sizes).astype(zero.value.dtype) for x, zero in pairs]
            return vary_like(full, self._runs)

        def body(dy: list[jax.Array], part: NodeSegment, other: PyTree) -> tuple[list[jax.Array], PyTree]:
            layer, end = other
            arrived: Leaves = [Lifted(leaf, axes) for leaf in dy]
            back = part.back(recurrence, arrived, [Lifted(leaf, axis) for leaf in end], sizes["r"])
            below = full(back.input)
            if len(climb) < self.depth:
                here = (layer >= climb.start) & (layer < climb.stop)
                at_once = full(part.back(Past.NONE, arrived, [], sizes["r"]).input)
                below = [jnp.where(here, a, b) for a, b in zip(below, at_once, strict=True)] if climb else at_once
            pairs = zip(back.start, self.node.carry.shapes, strict=True) if back.start else ()
            start = [broadcast(Lifted(jnp.zeros(shape)) if x is None else x, kept_axes, sizes) for x, shape in pairs]
            found = part.parameters(back, keep, sizes)
            shapes = self.node.params.shapes
            params = [
                broadcast(Lifted(jnp.zeros(shape)) if x is None else x, keep, sizes)
                for x, shape in zip(found, shapes, strict=True)
            ]
            if not keep:
                return below, (start, params, None)
            nothing = jnp.zeros((sizes["r"], sizes["b"], 0))
            flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in params] or [nothing]
            return below, (start, [], jnp.swapaxes(jnp.concatenate(flat, axis=-1), 0, 1))

        leaves, top, axis = LayerEnd([], None) if end is None else end
        others = (jnp.arange(self.depth), leaves)
        bottom, (start, params, rows) = self.over_layers(body, full(output), others, top)
        return DeepBack(start, params, rows, [Lifted(leaf, axes) for leaf in bottom])


def layer_end(part: DeepSegment, layer: jax.Array) -> LayerEnd:
    """Every unit vector on one layer's carry, (L, n, ...)."""
    view = part.node.carry
    here = jnp.arange(part.depth) == layer
    leaves = view.unflatten(jnp.eye(view.size))
    wide = [
        jnp.where(here.reshape(-1, *(1,) * leaf.ndim), leaf.astype(dtype), 0)
        for leaf, dtype in zip(leaves, view.dtypes, strict=True)
    ]
    return LayerEnd(wide, layer)
