"""The paper's recursion over C steps at once, in matrix products; C = 1 is the recursion as it is printed.

    grad   += (inside the segment, reverse mode)  +  sum over kept (v, k) of lambda^v_0 . S^{v,k}_start         eq. 4, 5
    S^{v,k}_end = sum over w of  dh^v_end/dh^w_start . S^{w,k}_start  +  dh^v_end/dtheta^k inside the segment   eq. 9-11

lambda_0 is the cotangent of the carries at the segment's start under the losses of the segment. All four terms are one
pull of cotangents back through the segment, node by node and within a node step by step: of the losses, or of unit
vectors on a carry's end. A source k sees a node through time only where the pair is kept; other nodes pass on what
their output owes to its own step. With exact=False dF/dh stands for its unit-local blocks D (eq. 6), in all terms.
(B. Millidge, "Generalizing E-prop to Deep Networks", arXiv:2512.24506.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.computed import parameter_values
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, Values, add, broadcast
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import Parts, RealView
from deepeprop_jax.network.cell import PyTree, Wire, assemble, connect, parents, select
from deepeprop_jax.segments.cotangents import vector
from deepeprop_jax.segments.depth import DeepBack, DeepSegment, LayerEnd
from deepeprop_jax.segments.kept import Kept, nodes_of, within
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.segments.through_time import Flags, Past, run_forward, with_inputs
from deepeprop_jax.segments.unit_vectors import back_units
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
        """The cotangent of what a wire carries, handed to the outputs that it is made of: eq. 11 transposed."""
        sources = parents(wire)
        if not sources or all(c is None for c in ct):
            return {}
        if isinstance(wire, int):
            return {wire: ct}
        views = {p: self.plan.nodes[p].output for p in sources}
        zeros = {p: [jnp.zeros(*leaf) for leaf in zip(views[p].shapes, views[p].dtypes, strict=True)] for p in sources}
        zeros = vary_like(zeros, self.one_input, self.one_outputs)

        def carried(real: dict[int, list[jax.Array]]) -> list[jax.Array]:
            joined = {p: views[p].join(real[p], views[p].split(self.one_outputs[p]).other) for p in sources}
            outputs = self.one_outputs | joined
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


Arrived = Back | DeepBack | None
"""What a flow finds in a node; None where nothing arrives."""


class Flow:
    """Cotangents on their way down through a segment, from one place, for every set of nodes that a source may see.

    From the losses, what it finds at the segment's start is lambda (eq. 5); from unit vectors on a last carry, M.

    Args:
      segment: the network that ran.
      outputs: the cotangent of the network's outputs, per real leaf; empty for zero.
      given: cotangents of nodes' outputs that the user gave; the nodes above take these outputs as constants.
      ends: per node, cotangents of its last carry: ``Leaves``, or where it has depth ``LayerEnd``.
      rows: size of axis r.
      exact: whether carries go back through dF/dh everywhere; else only where a source sees them, and through D.
    """

    def __init__(
        self,
        segment: Segment,
        outputs: Leaves,
        ends: Mapping[int, Leaves | LayerEnd] | None = None,
        rows: int = 1,
        exact: bool = False,
        given: Mapping[int, Leaves] | None = None,
    ):
        self.segment, self.plan, self.exact = segment, segment.plan, exact
        self.sizes = segment.sizes | {"r": rows}
        self.ends = dict(ends or {})
        graph = self.plan.graph
        self._seeds = segment.distribute(graph.output, self.plan.output, outputs, self.sizes) if outputs else {}
        for v, signal in (given or {}).items():
            arrived = self._seeds.get(v)
            self._seeds[v] = signal if arrived is None else [add(a, b) for a, b in zip(arrived, signal, strict=True)]
        self._found: dict[tuple[int, Kept], tuple[Arrived, dict[int, Leaves]]] = {}
        self.children: dict[int, list[int]] = {v: [] for v in range(len(graph.nodes))}
        self.above: list[frozenset[int]] = []
        for v, vertex in enumerate(graph.nodes):
            for p in parents(vertex.wire):
                self.children[p].append(v)
        for v in reversed(range(len(graph.nodes))):
            self.above.append(frozenset({v}.union(*(self.above[len(graph.nodes) - 1 - c] for c in self.children[v]))))
        self.above.reverse()

    def through(self, v: int, kept: Kept) -> Arrived:
        """What arrives in node v, and leaves it, where only what is in ``kept`` passes cotangents on through time."""
        reached = within(kept, range(max(self.ends) + 1)) if self.ends else kept
        return self._through(v, reached)[0]

    def _through(self, v: int, kept: Kept) -> tuple[Arrived, dict[int, Leaves]]:
        kept = within(kept, self.above[v])
        if (v, kept) not in self._found:
            self._found[v, kept] = self._compute(v, kept)
        return self._found[v, kept]

    def _compute(self, v: int, kept: Kept) -> tuple[Arrived, dict[int, Leaves]]:
        dy: Leaves = list(self._seeds.get(v, []))
        for w in self.children[v]:
            part = self._through(w, kept)[1].get(v, [])
            dy = [add(a, b) for a, b in zip(dy, part, strict=True)] if dy and part else dy or list(part)
        end = self.ends.get(v)
        if end is None and all(d is None for d in dy):
            return None, {}
        node, vertex = self.segment.nodes[v], self.plan.graph.nodes[v]
        recurrence = self.recurrence(v, kept)
        wanted = bool(parents(vertex.wire))
        upto = "input" if wanted else "carry"
        back: Back | DeepBack
        if isinstance(node, DeepSegment):
            keep = "rb" if self.ends else ""
            assert end is None or isinstance(end, LayerEnd)
            back = node.back(recurrence, dy, end, self.sizes, keep, self._climb(v, kept))
        elif recurrence is Past.LOCAL and end is not None:
            back = back_units(node, upto)
        else:
            assert not isinstance(end, LayerEnd)
            back = node.back(recurrence, dy, end or [], self.sizes["r"], upto)
        below = self.segment.distribute(vertex.wire, self.plan.nodes[v].input, back.input, self.sizes) if wanted else {}
        return back, below

    def _climb(self, v: int, kept: Kept) -> range:
        """See ``DeepSegment.back``."""
        seen = [span for span in kept if span.node == v]
        if self.exact or self.plan.hops is None or not seen:
            return range(self.plan.depth(v))
        return range(seen[0].low, seen[0].high) if self.plan.hops else range(0)

    def recurrence(self, v: int, kept: Kept) -> Past:
        """How a carry's cotangent of node v goes back in time, see ``NodeSegment.back``."""
        if self.exact:
            return Past.FULL
        if v not in nodes_of(kept):
            return Past.NONE
        return Past.FULL if self.plan.full_jacobian(v) else Past.LOCAL


def start_of(segment: Segment, p: int, back: Back | DeepBack, axes: str, sizes: dict[str, int]) -> jax.Array:
    """What a flow finds at the segment's start in node p: (*axes, n), behind an axis of layers where p has depth."""
    view, dtype = segment.plan.nodes[p].carry, segment.plan.dtype
    if isinstance(back, Back):
        return vector(view, dtype, back.start, axes, sizes)
    leaves = [leaf.reshape(*leaf.shape[: 1 + len(axes)], -1).astype(dtype) for leaf in back.start]
    return jnp.concatenate(leaves, axis=-1)
