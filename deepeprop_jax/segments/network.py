"""The paper's recursion over C steps at once, in matrix products; C = 1 is the recursion as it is printed.

    grad   += (inside the segment, reverse mode)  +  sum over kept (v, k) of lambda^v_0 . S^{v,k}_start         eq. 4, 5
    S^{v,k}_end = sum over p of  dh^v_end/dh^p_start . S^{p,k}_start  +  dh^v_end/dtheta^k inside the segment   eq. 9-11

lambda_0 is the cotangent of the carries at the segment's start under the losses of the segment. All four terms are one
pull of cotangents back through the segment, node by node and within a node step by step: of the losses, or of unit
vectors on a carry's end. A source k sees a node through time only where the pair is kept; other nodes pass on what
their output owes to its own step. With exact=False dF/dh stands for its unit-local blocks D (eq. 6), in all terms.
(B. Millidge, "Generalizing E-prop to Deep Networks", arXiv:2512.24506.)
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.computed import parameter_values
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, Values, broadcast
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import Parts, RealView
from deepeprop_jax.network.cell import PyTree, Wire, assemble, connect, parents, select
from deepeprop_jax.segments.depth import DeepSegment
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.through_time import Flags, run_forward, with_inputs
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.plan import Plan


class Prepared(NamedTuple):
    """A network made ready for a sequence.

    Attributes:
      plan: of the network.
      params: per node.
      values: per node, what depends on its parameters alone.
    """

    plan: Plan
    params: list[Parts]
    values: list[Values]


def prepare(plan: Plan, params: PyTree) -> Prepared:
    """Compute what depends on the parameters alone."""
    parts = [node.params.split(select(params, v.path)) for node, v in zip(plan.nodes, plan.graph.nodes, strict=True)]
    values = [
        Values([], {}) if vertex.depth is not None else parameter_values(node.program, p)  # of a layer, at the layer
        for node, p, vertex in zip(plan.nodes, parts, plan.graph.nodes, strict=True)
    ]
    return Prepared(plan, parts, values)


class Segment:
    """A network that has run through a segment.

    Attributes:
      carry_end: the network's carry after it.
      outputs: its outputs, (C, batch, ...).
      one_input, one_outputs: of one example at one step, the input and every node's output.
    """

    def __init__(self, ready: Prepared, carry: PyTree, initial: PyTree, xs: PyTree, flags: Flags):
        plan = self.plan = ready.plan
        self.nodes: list[NodeSegment | DeepSegment] = []
        ends: list[PyTree] = []
        outputs: dict[int, PyTree] = {}
        for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
            start, origin = (node.carry.split(select(tree, vertex.path)) for tree in (carry, initial))
            u = node.input.split(connect(vertex.wire, xs, outputs))
            p = ready.params[v]
            if vertex.depth is not None:
                by_layer = [jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tree) for tree in (start, origin)]
                part: NodeSegment | DeepSegment = DeepSegment(node, p, by_layer[0], by_layer[1], u, flags, vertex.depth)
                end = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), part.carry_end)
            else:
                local = plan.low_rank[v] is not None or any(block.kind is Rows.LOCAL for block in plan.own[v])
                values = with_inputs(node.program, ready.values[v], u)
                run = run_forward(node.program, values, start, origin, u, flags)
                part, end = NodeSegment(node, p, values, run, u, flags, local), run.carry_end
            self.nodes.append(part)
            outputs[v] = node.output.join(*part.outputs)
            ends.append(node.carry.join(*end))
        self.carry_end = assemble(plan.graph, ends)
        self.outputs = connect(plan.graph.output, xs, outputs)
        leaf = jax.tree.leaves(xs)[0]
        self.sizes = {"c": leaf.shape[0], "b": leaf.shape[1]}
        # What a wire carries beside real numbers, of one example: connect() wants it, no derivative depends on it.
        self.one_input, self.one_outputs = jax.tree.map(lambda leaf: leaf[0, 0], (xs, outputs))

    def after_resets(self) -> Segment:
        """The segment as its last carries, and so the traces, depend on it; without resets the segment itself."""
        seen = copy.copy(self)
        seen.nodes = [node.after_resets() for node in self.nodes]
        return seen

    def distribute(self, wire: Wire, view: RealView, ct: Leaves, sizes: dict[str, int]) -> dict[int, Leaves]:
        """The cotangent of what a wire carries, handed to the outputs that it is made of."""
        sources = parents(wire)
        if not sources or all(c is None for c in ct):
            return {}
        if isinstance(wire, int):
            return {wire: ct}
        views = {p: self.plan.nodes[p].output for p in sources}
        zeros = {p: [jnp.zeros(*leaf) for leaf in zip(views[p].shapes, views[p].dtypes, strict=True)] for p in sources}
        zeros = vary_like(zeros, self.one_input, self.one_outputs)

        def carried(real: dict[int, list[jax.Array]]) -> list[jax.Array]:
            outputs = {p: views[p].join(real[p], views[p].split(self.one_outputs[p]).other) for p in sources}
            return view.split(connect(wire, self.one_input, outputs)).real

        values, pull = jax.vjp(carried, zeros)
        axes = "".join(a for a in "crb" if any(c is not None and a in c.axes for c in ct))
        full = []
        for c, value in zip(ct, values, strict=True):
            shape = (*(sizes[a] for a in axes), *value.shape)
            full.append(jnp.zeros(shape, value.dtype) if c is None else broadcast(c, axes, sizes).astype(value.dtype))
        for _ in axes:
            pull = jax.vmap(pull)
        (found,) = pull(vary_like(full, values))
        return {p: [Lifted(leaf, axes) for leaf in leaves] for p, leaves in found.items()}
