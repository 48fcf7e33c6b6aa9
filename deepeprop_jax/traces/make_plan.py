"""How a plan is made: which influences are kept, and how each node's own trace is held."""

from __future__ import annotations

import itertools

import numpy as np

from deepeprop_jax.analysis.node import AnalysedNetwork, Node, Reach
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.program import Atom, is_variable
from deepeprop_jax.jaxpr.real_leaves import float32_or_wider
from deepeprop_jax.network.cell import parents
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.hops import Hops
from deepeprop_jax.traces.low_rank import Layout, PlaceOfLeaf
from deepeprop_jax.traces.plan import Mode, Plan, needs_full_jacobian
from deepeprop_jax.traces.projected import Projection


def make_plan(network: AnalysedNetwork, trained: tuple[tuple[int, ...], ...], mode: Mode) -> Plan:
    """Decide which influences are kept, and how.

    Args:
      trained: per node, the indices of its trained real parameter leaves.
    """
    exact, hops, rank = mode.exact, mode.hops, mode.rank
    graph, nodes = network.graph, network.nodes
    columns = tuple(sum(n.params.sizes[i] for i in idx) for n, idx in zip(nodes, trained, strict=True))
    dtype = float32_or_wider(*(dtype for node in nodes for dtype in node.params.dtypes + node.carry.dtypes))
    blocks = [own_blocks(node, idx, exact) for node, idx in zip(nodes, trained, strict=True)]
    projection = None
    if mode.carry_rank is not None:
        projection, hops = _projection(network, trained, mode.carry_rank, mode.project_every), 0
        blocks = blocks if mode.own_traces else [()] * len(nodes)
        deep = [vertex.name for vertex in graph.nodes if vertex.depth is not None]
        if mode.own_traces and deep:
            raise ValueError(
                f"own_traces are not kept beside the projected carry of a stack(cell, depth=L), here of node "
                f"{deep[0]!r}. Write its layers out, or leave own_traces out."
            )
    layouts = [None if rank is None else layout_of(n, own, rank) for n, own in zip(nodes, blocks, strict=True)]
    gone = [set() if layout is None else {block.leaves for block in layout.blocks} for layout in layouts]
    own = tuple(tuple(b for b in bs if b.leaves not in leaves) for bs, leaves in zip(blocks, gone, strict=True))
    reach = Hops(graph, nodes, columns, hops)
    bands = tuple(reach.band(v) for v in range(len(nodes)))
    pairs, transmitted = reach.pairs()
    return Plan(
        graph, nodes, exact, hops, rank, trained, columns, own, tuple(layouts), bands, pairs, transmitted, projection,
        dtype, network.output, network.output_avals,
    )  # fmt: skip


def _projection(network: AnalysedNetwork, trained: tuple[tuple[int, ...], ...], rank: int, every: int) -> Projection:
    """See ``Projection``."""
    graph, nodes = network.graph, network.nodes
    seen: list[bool] = [node.carry.size > 0 for node in nodes]
    for v in reversed(range(len(nodes))):
        for p in parents(graph.nodes[v].wire):
            seen[p] = seen[p] or seen[v]
    sources = tuple(k for k, leaves in enumerate(trained) if leaves and seen[k])
    sizes = [(vertex.depth or 1) * node.carry.size for vertex, node in zip(graph.nodes, nodes, strict=True)]
    starts = tuple(itertools.accumulate(sizes, initial=0))
    if rank > starts[-1]:
        raise ValueError(
            f"carry_rank={rank} is more than the {starts[-1]} real numbers of the network's carry; with as many "
            f"directions as numbers the gradient is that of BPTT, as with exact=True."
        )
    return Projection(rank, every, sources, starts)


def own_blocks(node: Node, trained: tuple[int, ...], exact: bool) -> tuple[Block, ...]:
    """One block per leaf that is local, one for all that are dense together."""
    blocks, dense = [], []
    for i in trained:
        leaf = node.leaves[i]
        if leaf.reach is Reach.NONE or node.params.sizes[i] == 0:
            continue
        if leaf.reach is Reach.LOCAL and not needs_full_jacobian(node, exact):
            blocks.append(Block(Rows.LOCAL, (i,), leaf.unit, node.units.slots, node.params.sizes[i]))
        else:
            dense.append(i)
    if dense:
        columns = sum(node.params.sizes[i] for i in dense)
        blocks.append(Block(Rows.DENSE, tuple(dense), None, node.carry.size, columns))
    return tuple(blocks)


def layout_of(node: Node, own: tuple[Block, ...], rank: int) -> Layout | None:
    """Find the leaves whose immediate influence is an outer product as it stands; None where there is none."""
    cuts = node.program.cuts
    number = {variable: i for i, variable in enumerate(cuts.variables)}
    rows: dict[Atom, tuple[int, np.ndarray]] = {}  # per delta its number and units
    columns: dict[Atom, int] = {}  # per z its size
    found = []
    for block in own:
        output = cuts.outputs[block.leaves[0]]
        product = cuts.products[number[output]] if is_variable(output) and output in number else None
        if block.unit is None or product is None or not product.is_outer:
            continue
        rows_first = (product.side == 0) != product.swapped
        unit = thin.compact(block.unit.reshape(node.params.shapes[block.leaves[0]]))
        unit = unit if rows_first else unit.T
        delta, z = product.equation.inputs[product.side], product.equation.inputs[1 - product.side]
        known = rows.get(delta, (number[output], unit[:, 0]))
        if thin.core(unit).shape[1] == 1 and np.array_equal(unit[:, 0], known[1]):
            rows[delta] = known
            columns[z] = unit.shape[1]
            found.append((block, delta, z, rows_first))
    if not found:
        return None
    widths = [unit.size for _, unit in rows.values()]
    row_slices = dict(zip(rows, _slices(widths), strict=True))
    column_slices = dict(zip(columns, _slices(list(columns.values())), strict=True))
    return Layout(
        rank,
        tuple(block for block, *_ in found),
        tuple(PlaceOfLeaf(row_slices[delta], column_slices[z], first) for _, delta, z, first in found),
        tuple(index for index, _ in rows.values()),
        tuple(columns),
        tuple(widths),
        tuple(columns.values()),
        np.concatenate([unit for _, unit in rows.values()]),
        node.units.slots,
    )


def _slices(widths: list[int]) -> list[slice]:
    ends = np.cumsum([0, *widths])
    return [slice(int(start), int(end)) for start, end in itertools.pairwise(ends)]
