"""The static plan of a network: the influences that are kept, and the layout of their traces."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.network.cell import Graph, PyTree
from deepeprop_jax.traces.block import Block
from deepeprop_jax.traces.low_rank import Layout
from deepeprop_jax.traces.projected import Projection

Traces = dict[str, PyTree]
"""Per kept pair, ``"v <- k"``: the node's own traces (a tuple with one array per block, or ``DeepTraces``), or the
influence across nodes as one array (batch, n, columns), with a leading axis of layers where v has depth; where v only
filters k's output, a tuple of arrays (batch, G, |leaf|), see ``Filter``."""


Given = dict[int, PyTree]
"""Per node a learning signal, which stands in place of the cotangent of its output: (C, batch, ...)."""


class Mode(NamedTuple):
    """Which influences are kept, and how: the options of ``deep_eprop`` of these names."""

    exact: bool = False
    hops: int | None = None
    rank: int | None = None
    carry_rank: int | None = None
    own_traces: bool = False
    project_every: int = 8
    carry_factor: int | None = None
    signals: tuple[str, ...] = ()


class KeptPair(NamedTuple):
    """A kept influence S^{v,k} of node k's parameters on another node v's carry.

    Attributes:
      layers: how many layers of v keep it, counted from below (1 unless v is a ``stack(cell, depth=L)``).
      sources: how many layers of k it is kept of, counted from above.
      columns: trained parameter entries of those layers.
      mask: (layers, sources) which combinations are within the hops; None for all.
    """

    layers: int
    sources: int
    columns: int
    mask: np.ndarray | None


class Filter(NamedTuple):
    """How one node filters the output of another.

    Attributes:
      decays: (G,) its distinct constants.
      group: (n,) which of them each number of its carry has.
      shown: (units of the node below,) the number of the output that shows a unit, -1 for none.
      blocks: what of the source is kept, a leaf each: its own blocks, all local; or, of a node without a carry, blocks
        without rows, whose units are its outputs.
    """

    decays: np.ndarray
    group: np.ndarray
    shown: np.ndarray
    blocks: tuple[Block, ...]


def needs_full_jacobian(node: Node, exact: bool) -> bool:
    """Whether a node's recurrence enters in full: exact mode, where it is not element-wise."""
    return exact and node.recurrent and not node.elementwise


class Plan(NamedTuple):
    """All that is decided about a network before a value is computed.

    Attributes:
      graph: the network.
      nodes: per vertex, its cell after analysis (of one layer, where the vertex has depth).
      exact, hops, rank: those of its ``Mode``.
      trained: per node, the indices of its trained real parameter leaves.
      columns: per node, the number of trained real parameter entries (of one layer).
      own: per node, the blocks of its own trace, but for those of low rank.
      low_rank: per node, what of its own trace is one product of low rank.
      bands: per node with depth, over how many layers upward its own influences are kept.
      pairs: the kept influences across nodes, by (v, k).
      filtered: those of them that a row per constant of a filter stands for.
      transmitted: the (p, k) whose output influence Y^{p,k} something above needs.
      projection: what is carried along few directions; None without ``carry_rank``.
      given: the nodes whose learning signal is given, by name; the nodes above take their outputs as constants.
      dtype: of all traces.
      output: view of the network's output, of one example.
      output_avals: its shapes and dtypes.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    exact: bool
    hops: int | None
    rank: int | None
    trained: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    own: tuple[tuple[Block, ...], ...]
    low_rank: tuple[Layout | None, ...]
    bands: tuple[int, ...]
    pairs: dict[tuple[int, int], KeptPair]
    filtered: dict[tuple[int, int], Filter]
    transmitted: frozenset[tuple[int, int]]
    projection: Projection | None
    given: dict[str, int]
    dtype: np.dtype
    output: RealView
    output_avals: PyTree

    def depth(self, v: int) -> int:
        """Number of layers of a node: L of a ``stack(cell, depth=L)``, else 1."""
        return self.graph.nodes[v].depth or 1

    def all_columns(self, k: int) -> int:
        """Trained parameter entries of a node, all of its layers together."""
        return self.depth(k) * self.columns[k]

    def leaf_shapes(self, v: int) -> list[tuple[int, ...]]:
        """Shapes of a node's real parameter leaves, with a leading axis L where it has depth."""
        layers = () if self.graph.nodes[v].depth is None else (self.depth(v),)
        return [(*layers, *shape) for shape in self.nodes[v].params.shapes]

    def sources(self, v: int) -> list[int]:
        """Nodes below v whose influence arrives at v: kept there, or passed on."""
        return [k for k in range(v) if (v, k) in self.pairs or (v, k) in self.transmitted]

    def full_jacobian(self, v: int) -> bool:
        """Whether node v's recurrence enters in full: exact mode, where it is not element-wise."""
        return needs_full_jacobian(self.nodes[v], self.exact)

    def name(self, v: int, k: int) -> str:
        """The key of S^{v,k} in the state's traces."""
        return f"{self.graph.nodes[v].name} <- {self.graph.nodes[k].name}"

    def low_rank_name(self, v: int) -> str:
        """The key of what of S^{v,v} is of low rank."""
        return f"{self.name(v, v)}, low rank"

    def trace_names(self, v: int) -> list[str]:
        """The keys of all that may be kept of influences on node v's carry."""
        return [*(self.name(v, k) for k in range(v + 1)), self.low_rank_name(v)]
