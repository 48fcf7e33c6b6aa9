"""Cotangents on their way down through the nodes of a segment.

lambda of eq. 5 is what a flow from the losses finds at the segment's start; a flow from unit vectors on a carry's end
finds the rows of dh_end/dh_start there. A source k sees a node through time only where the pair is kept; other nodes
pass on what their output owes to its own step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import Leaves, add
from deepeprop_jax.network.cell import parents
from deepeprop_jax.segments.cotangents import vector
from deepeprop_jax.segments.depth import DeepBack, DeepSegment, LayerEnd
from deepeprop_jax.segments.kept import Kept, nodes_of, within
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.segments.node import Back
from deepeprop_jax.segments.through_time import Past
from deepeprop_jax.segments.unit_vectors import back_units

Arrived = Back | DeepBack | None
"""What a flow finds in a node; None where nothing arrives."""


class Flow:
    """Cotangents on their way down through a segment, from one place, for every set of nodes that a source may see.

    Args:
      segment: the network that ran.
      outputs: the cotangent of the network's outputs, per real leaf; empty for zero.
      end: a node, and unit vectors on its last carry: ``Leaves``, or where it has depth ``depth.unit_vectors``.
      rows: size of axis r.
      exact: whether carries go back through dF/dh everywhere; else only where a source sees them, and through D.
    """

    def __init__(
        self,
        segment: Segment,
        outputs: Leaves,
        end: tuple[int, Leaves | LayerEnd] | None = None,
        rows: int = 1,
        exact: bool = False,
    ):
        self.segment, self.plan, self.exact = segment, segment.plan, exact
        self.sizes = segment.sizes | {"r": rows}
        self.end = end
        graph = self.plan.graph
        self._seeds = segment.distribute(graph.output, self.plan.output, outputs, self.sizes) if outputs else {}
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
        reached = kept if self.end is None else within(kept, range(self.end[0] + 1))
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
        end = self.end[1] if self.end is not None and self.end[0] == v else None
        if end is None and all(d is None for d in dy):
            return None, {}
        node, vertex = self.segment.nodes[v], self.plan.graph.nodes[v]
        recurrence = self.recurrence(v, kept)
        wanted = bool(parents(vertex.wire))
        upto = "input" if wanted else "carry"
        back: Back | DeepBack
        if isinstance(node, DeepSegment):
            keep = "" if self.end is None else "rb"
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
