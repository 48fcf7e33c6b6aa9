"""How a plan is made: which influences are kept, and how each node's own trace is held."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from deepeprop_jax.analysis.filtered import decays, shown, written
from deepeprop_jax.analysis.node import AnalysedNetwork, Node, Reach
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.program import Atom, is_variable
from deepeprop_jax.jaxpr.real_leaves import float32_or_wider
from deepeprop_jax.network.cell import parents
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.hops import Hops
from deepeprop_jax.traces.low_rank import Layout, PlaceOfLeaf
from deepeprop_jax.traces.plan import Filter, KeptPair, Mode, Plan, needs_full_jacobian
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
        projection, hops = _projection(network, trained, mode), 0
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
    whole = [own[v] if layout is None else () for v, layout in enumerate(layouts)]
    filtered = _filtered(network, pairs, trained, whole)
    given = {vertex.name: v for v, vertex in enumerate(graph.nodes) if vertex.name in mode.signals}
    return Plan(
        graph, nodes, exact, hops, rank, trained, columns, own, tuple(layouts), bands, pairs, filtered, transmitted,
        projection, given, dtype, network.output, network.output_avals,
    )  # fmt: skip


def _filtered(
    network: AnalysedNetwork,
    pairs: dict[tuple[int, int], KeptPair],
    trained: tuple[tuple[int, ...], ...],
    own: list[tuple[Block, ...]],
) -> dict[tuple[int, int], Filter]:
    """Every pair as that of a node and a filter of its output; none where one of them is not.

    Beside general traces it would not pay: single steps of those go up, and filtered ones do not.

    Args:
      own: per node its own blocks; none where a part of them is of low rank.
    """
    vertices, nodes, found = network.graph.nodes, network.nodes, {}
    for w, v in pairs:
        direct = vertices[w].wire == v and vertices[w].depth is None and vertices[v].depth is None
        kept = decays(nodes[w]) if direct else None
        source = None if kept is None else _shown_source(nodes[v], trained[v], own[v])
        if kept is None or source is None:
            return {}
        distinct, group = np.unique(kept, return_inverse=True)
        if len(distinct) == nodes[w].carry.size > 1:
            return {}  # as many numbers as the general trace has
        found[w, v] = Filter(distinct, group.reshape(-1), *source)
    return found


def _shown_source(
    node: Node, trained: tuple[int, ...], own: tuple[Block, ...]
) -> tuple[np.ndarray, tuple[Block, ...]] | None:
    """``shown`` and ``blocks`` of a ``Filter``; None where an entry of a parameter has a part in several outputs."""
    if node.recurrent:
        outputs = shown(node) if own and all(block.kind is Rows.LOCAL for block in own) else None
        return None if outputs is None else (outputs, own)
    numbers, blocks = written(node), []
    for i in trained:
        unit = numbers[i]
        if unit is None or (unit < 0).any():
            return None
        blocks.append(Block(Rows.LOCAL, (i,), unit, 0, node.params.sizes[i]))
    return np.arange(node.output.size), tuple(blocks)


def _projection(network: AnalysedNetwork, trained: tuple[tuple[int, ...], ...], mode: Mode) -> Projection:
    """See ``Projection``."""
    graph, nodes, rank, factor = network.graph, network.nodes, mode.carry_rank, mode.carry_factor
    assert rank is not None
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
    layouts: list[Layout | None] = [None] * len(nodes)
    for k in sources:
        # What the output reads itself has an influence that is no product of the carry's deltas.
        if factor is None or not rank or graph.nodes[k].depth is not None or "params" in nodes[k].cut.output_uses:
            continue
        if nodes[k].recurrent:
            layouts[k] = layout_of_directions(nodes[k], trained[k], rank, factor)
    return Projection(rank, mode.project_every, sources, starts, factor, tuple(layouts))


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


class _Outer(NamedTuple):
    """A leaf whose immediate influence is an outer product as it stands: delta (x) z, or its transpose."""

    block: Block
    number: int
    delta: Atom
    z: Atom
    rows_first: bool


def layout_of(node: Node, own: tuple[Block, ...], rank: int) -> Layout | None:
    """How a node's own local traces are one product of low rank; None where none of them is an outer product."""
    units: dict[Atom, np.ndarray] = {}
    found = []
    for block in own:
        outer = None if block.unit is None else _outer(node, block)
        if outer is None or block.unit is None:
            continue
        unit = thin.compact(block.unit.reshape(node.params.shapes[block.leaves[0]]))
        unit = unit if outer.rows_first else unit.T
        known = units.get(outer.delta, unit[:, 0])
        if thin.core(unit).shape[1] == 1 and np.array_equal(unit[:, 0], known):
            units[outer.delta] = known
            found.append(outer)
    if not found:
        return None
    return _layout(node, found, rank, np.concatenate(list(units.values())), node.units.slots)


def layout_of_directions(node: Node, trained: tuple[int, ...], directions: int, rank: int) -> Layout | None:
    """How a node's part of a projected carry is one product of low rank: a slot is a direction."""
    blocks = (Block(Rows.DENSE, (i,), None, directions, node.params.sizes[i]) for i in trained if node.params.sizes[i])
    found = [outer for outer in (_outer(node, block) for block in blocks) if outer is not None]
    if not found:
        return None
    layout = _layout(node, found, rank, None, directions)
    return layout._replace(rank=min(rank, directions * layout.rows, layout.columns))


def _outer(node: Node, block: Block) -> _Outer | None:
    cuts = node.program.cuts
    output = cuts.outputs[block.leaves[0]]
    if not is_variable(output) or output not in cuts.variables:
        return None
    number = cuts.variables.index(output)
    product = cuts.products[number]
    if product is None or not product.is_outer:
        return None
    delta, z = product.equation.inputs[product.side], product.equation.inputs[1 - product.side]
    return _Outer(block, number, delta, z, (product.side == 0) != product.swapped)


def _layout(node: Node, found: list[_Outer], rank: int, unit: np.ndarray | None, slots: int) -> Layout:
    rows: dict[Atom, tuple[int, int]] = {}  # per delta its number and width
    columns: dict[Atom, int] = {}  # per z its width
    for outer in found:
        shape = node.params.shapes[outer.block.leaves[0]]
        height, width = shape if outer.rows_first else shape[::-1]
        rows.setdefault(outer.delta, (outer.number, height))
        columns[outer.z] = width
    numbers, heights = zip(*rows.values(), strict=True)
    row_slices = dict(zip(rows, _slices(list(heights)), strict=True))
    column_slices = dict(zip(columns, _slices(list(columns.values())), strict=True))
    return Layout(
        rank,
        tuple(outer.block for outer in found),
        tuple(PlaceOfLeaf(row_slices[o.delta], column_slices[o.z], o.rows_first) for o in found),
        numbers,
        tuple(columns),
        heights,
        tuple(columns.values()),
        unit,
        slots,
    )


def _slices(widths: list[int]) -> list[slice]:
    ends = np.cumsum([0, *widths])
    return [slice(int(start), int(end)) for start, end in itertools.pairwise(ends)]
