"""Which influences across nodes and layers are kept: those within ``hops`` recurrent layers upward."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.network.cell import Graph, parents
from deepeprop_jax.traces.plan import KeptPair


class Hops(NamedTuple):
    """A network, and how far an influence is kept.

    Attributes:
      graph, nodes: the network.
      columns: per node, the number of trained real parameter entries (of one layer).
      hops: as given to ``deep_eprop``.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    columns: tuple[int, ...]
    hops: int | None

    def _depth(self, v: int) -> int:
        return self.graph.nodes[v].depth or 1

    def band(self, v: int) -> int:
        """Layers of a ``stack(cell, depth=L)`` over which an influence is kept: L - 1, or the hops."""
        reach = self._depth(v) - 1 if self.nodes[v].recurrent and self.columns[v] else 0
        return reach if self.hops is None else min(reach, self.hops)

    def pairs(self) -> tuple[dict[tuple[int, int], KeptPair], frozenset[tuple[int, int]]]:
        """Distances in recurrent nodes entered, the pairs within the hops, and the outputs that those need."""
        count = len(self.nodes)
        recurrent = [int(node.recurrent) for node in self.nodes]
        below = [[p for p in parents(vertex.wire) if self.nodes[p].output.size] for vertex in self.graph.nodes]
        distance: dict[tuple[int, int], int] = {}  # from the top layer of k to the bottom layer of v
        pairs: dict[tuple[int, int], KeptPair] = {}
        for k in range(count):
            if not self.columns[k]:
                continue
            for v in range(k + 1, count):
                through = [
                    0 if p == k else distance[p, k] + (self._depth(p) - 1) * recurrent[p]
                    for p in below[v]
                    if p == k or (p, k) in distance
                ]
                if through:
                    distance[v, k] = min(through) + recurrent[v]
                    pair = self._pair(v, k, distance[v, k])
                    if pair is not None:
                        pairs[v, k] = pair
        transmitted: set[tuple[int, int]] = set()
        for v in reversed(range(count)):
            for k in range(v):
                if (v, k) in pairs or (v, k) in transmitted:
                    transmitted |= {(p, k) for p in below[v] if p == k or (p, k) in distance}
        return pairs, frozenset(transmitted)

    def _pair(self, v: int, k: int, distance: int) -> KeptPair | None:
        if not self.nodes[v].recurrent:
            return None
        # Source layers below the top of k are farther away, one hop each if they are recurrent.
        up = np.arange(self._depth(v))[:, None]
        down = np.arange(self._depth(k))[None, ::-1] * int(self.nodes[k].recurrent)
        far = distance + up + down
        kept = np.ones(far.shape, bool) if self.hops is None else far <= self.hops
        if not kept.any():
            return None
        layers, sources = int(kept.any(1).sum()), int(kept.any(0).sum())
        box = kept[:layers, kept.shape[1] - sources :]
        return KeptPair(layers, sources, sources * self.columns[k], None if box.all() else box)
