"""Influences across nodes of few numbers: the rows of all nodes at once, so that a program grows with the depth alone.

For every source k the traces S^{v,k} of all v above it are one array T^k, rows one node after the other:

    T^k_end = J^k T^k  +  (dh_end/dh^k_start) S^{k,k}  +  dh_end/dtheta^k inside the segment

J^k is the derivative of all their last carries by all their first ones. Unit vectors on every last carry go down
through the nodes together: a node is pulled through once for all that is above it, where one node after the other is a
pull for every pair, and a product for every three. That is as much to compute, in fewer and larger operations; it needs
the cotangents of all rows at once, so it is for nodes that are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.batched import Leaves, Lifted, add, broadcast
from deepeprop_jax.network.cell import parents
from deepeprop_jax.segments.cotangents import rows_of
from deepeprop_jax.segments.depth import DeepSegment
from deepeprop_jax.segments.kept import Kept, everything, kept_by, nodes_of, within
from deepeprop_jax.segments.ladder import Ladder, climb_down, ladders
from deepeprop_jax.segments.network import Flow, Segment, start_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.segments.through_time import Past
from deepeprop_jax.segments.unit_vectors import back_units
from deepeprop_jax.traces import dense
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.products import own_columns

_ROOM = 2**16
"""Bytes that one array of the cotangents of all rows may take; in larger ones, products with zeros take the time."""

_FEWEST = 8
"""Nodes that an influence arrives at for which it is worth it."""


def applies(plan: Plan, length: int, batch: int) -> bool:
    """Whether the influences across nodes are held and moved together."""
    targets = {v for v, _ in plan.pairs}
    if len(targets) < _FEWEST or plan.filtered or any(vertex.depth is not None for vertex in plan.graph.nodes):
        return False
    if any(block.kind is Rows.DENSE for own in plan.own for block in own):
        return False
    rows = sum(plan.nodes[v].carry.size for v in targets)
    widest = max(node.carry.size + node.input.size for node in plan.nodes)
    return length * batch * rows * widest * np.dtype(plan.dtype).itemsize <= _ROOM


def targets_of(plan: Plan, k: int) -> tuple[int, ...]:
    """The nodes with a kept influence of node k, in order."""
    return tuple(sorted(v for v, source in plan.pairs if source == k))


def name_of(plan: Plan, k: int) -> str:
    """The key of T^k."""
    return f"all <- {plan.graph.nodes[k].name}"


def ladder_of(plan: Plan) -> dict[int, tuple[int, ...]]:
    """The ladder of each node that is part of one."""
    return {p: nodes for nodes in ladders(plan) for p in nodes}


def rows_of_source(plan: Plan, k: int) -> tuple[int, ...]:
    """Whose rows T^k has. Those of a ladder have the same, zero where a node is not above k: what is computed of them
    is then of one shape, which XLA compiles once."""
    lowest = _like(plan, k)
    own = {lowest} & {v for v, _ in plan.pairs} if k in ladder_of(plan) else set()
    return tuple(sorted(own | set(targets_of(plan, lowest))))


def _like(plan: Plan, k: int) -> int:
    """The source whose rows T^k has: the lowest node of its ladder."""
    return ladder_of(plan).get(k, (k,))[0]


def pack(plan: Plan, traces: Traces) -> Traces:
    """Traces with those across nodes as one per source, which they may be already."""
    packed = dict(traces)
    for k in range(len(plan.nodes)):
        targets = targets_of(plan, k)
        if targets and plan.name(targets[0], k) in packed:
            like, parts = packed[plan.name(targets[0], k)], []
            for v in rows_of_source(plan, k):
                shape = (like.shape[0], plan.nodes[v].carry.size, like.shape[2])
                parts.append(packed.pop(plan.name(v, k)) if v in targets else jnp.zeros(shape, like.dtype))
            packed[name_of(plan, k)] = jnp.concatenate(parts, axis=1)
    return packed


def unpack(plan: Plan, traces: Traces) -> Traces:
    """The inverse of ``pack``; others stay as they are."""
    traces = dict(traces)
    for k in range(len(plan.nodes)):
        if name_of(plan, k) in traces:
            rows = rows_of_source(plan, k)
            ends = np.cumsum([plan.nodes[v].carry.size for v in rows])[:-1]
            parts = dict(zip(rows, jnp.split(traces.pop(name_of(plan, k)), ends, axis=1), strict=True))
            traces |= {plan.name(v, k): parts[v] for v in targets_of(plan, k)}
    return traces


def gradient(segment: Segment, flow: Flow, k: int, exact: bool, traces: Traces) -> jax.Array:
    """``sum over v of lambda^v_0 . S^{v,k}_start``, (columns of k,)."""
    plan, starts = segment.plan, []
    seen = everything(plan) if exact else kept_by(plan, _like(plan, k))
    for v in rows_of_source(plan, k):
        back = flow.through(v, seen)
        if back is None or not back.start:
            starts.append(jnp.zeros((flow.sizes["b"], plan.nodes[v].carry.size), plan.dtype))
        else:
            starts.append(start_of(segment, v, back, "b", flow.sizes))
    return dense.contract(jnp.concatenate(starts, axis=-1), traces[name_of(plan, k)])


def update(segment: Segment, traces: Traces) -> Traces:
    """Every T^k, from the segment's start to its end."""
    plan = segment.plan
    flow = JointFlow(segment, traces)
    jacobians: dict[tuple, jax.Array] = {}
    found: Traces = {}
    for k in range(len(plan.nodes)):
        if name_of(plan, k) not in traces:
            continue
        wanted = rows_of_source(plan, k)
        if k in flow.ladder_of:
            owner = np.repeat(wanted, [plan.nodes[v].carry.size for v in wanted])
            new = jnp.where((owner > k)[:, None], flow.ladder(k).columns[flow.ladder_of[k].index(k)], 0)
        else:
            new = _inside(segment, flow, k)
            back, rows = flow.rows(k, kept_by(plan, k))
            known = plan.name(k, k) in traces or plan.low_rank[k] is not None
            if known and back is not None and back.start:
                start = start_of(segment, k, back, "rb", flow.sizes_of(rows))
                matrix = jnp.swapaxes(flow.moved(start, 0, rows, wanted), 0, 1)
                new = new + own_columns(plan, k, plan.trained[k], matrix, traces)
        found[name_of(plan, k)] = (
            _jacobian(segment, flow, _like(plan, k), wanted, jacobians) @ traces[name_of(plan, k)] + new
        )
    return found


class JointFlow(Flow):
    """Unit vectors on the last carries of all nodes that an influence arrives at, on their way down together.

    At a node axis r holds the rows of those nodes above it that a source sees, one node after the other.
    """

    def __init__(self, segment: Segment, traces: Traces):
        super().__init__(segment, [])
        self._traces = traces
        self.ladder_of = ladder_of(self.plan)
        self._down: dict[tuple[int, ...], Ladder] = {}
        self._targets = frozenset(v for v, _ in self.plan.pairs)
        self._joint: dict[tuple[int, Kept], tuple[Back | None, dict[int, Leaves]]] = {}

    def rows(self, p: int, kept: Kept) -> tuple[Back | None, tuple[int, ...]]:
        """What arrives in node p where only nodes in ``kept`` pass cotangents on in time, and whose rows it has."""
        kept = within(kept, self.above[p])
        return self._pulled(p, kept)[0], self._whose(kept)

    def sizes_of(self, nodes: Sequence[int]) -> dict[str, int]:
        """Sizes of all axes, for the rows of some nodes."""
        return self.sizes | {"r": sum(self.plan.nodes[v].carry.size for v in nodes)}

    def moved(self, x: jax.Array, axis: int, rows: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
        """Rows of some nodes along an axis as those of others: without some, and zero where there were none."""
        size = {v: self.plan.nodes[v].carry.size for v in {*rows, *wanted}}
        offset = dict(zip(rows, np.cumsum([0, *(size[v] for v in rows)]), strict=False))
        parts: list[jax.Array] = []
        stretch: list[int] = []

        def close() -> None:
            if stretch and stretch[0] in offset:
                first = int(offset[stretch[0]])
                parts.append(jax.lax.slice_in_dim(x, first, first + sum(size[v] for v in stretch), axis=axis))
            elif stretch:
                shape = (*x.shape[:axis], sum(size[v] for v in stretch), *x.shape[axis + 1 :])
                parts.append(jnp.zeros(shape, x.dtype))
            stretch.clear()

        if rows == wanted:
            return x
        for v in wanted:
            if stretch and ((v in offset) != (stretch[-1] in offset) or not self._next(rows, stretch[-1], v)):
                close()
            stretch.append(v)
        close()
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)

    @staticmethod
    def _next(rows: tuple[int, ...], before: int, after: int) -> bool:
        return before not in rows or rows.index(after) == rows.index(before) + 1

    def _whose(self, kept: Kept) -> tuple[int, ...]:
        return tuple(nodes_of(within(kept, self._targets)))

    def _pulled(self, p: int, kept: Kept) -> tuple[Back | None, dict[int, Leaves]]:
        if (p, kept) not in self._joint:
            self._joint[p, kept] = self._pull(p, kept)
        return self._joint[p, kept]

    def ladder(self, p: int) -> Ladder:
        """What is found in the ladder that node p is part of."""
        nodes = self.ladder_of[p]
        above = {p: within(everything(self.plan), self.above[p]) for p in (nodes[0], nodes[-1])}
        rows = self._whose(above[nodes[0]])
        if nodes not in self._down:
            dy = self._arriving(nodes[-1], above[nodes[-1]], rows)
            by_node = [self._unit_vectors(v, rows) for v in nodes]
            end = [jnp.stack([x.value for x in leaves if x is not None]) for leaves in zip(*by_node, strict=True)]
            parts = [_simple(self.segment.nodes[v]) for v in nodes]
            self._down[nodes] = climb_down(self.plan, parts, nodes, dy, end, self._traces, self.sizes_of(rows))
        return self._down[nodes]

    def _arriving(self, p: int, kept: Kept, rows: tuple[int, ...]) -> Leaves:
        dy: Leaves = []
        for w in self.children[p]:
            there = within(kept, self.above[w])
            part = [self._as_rows(x, self._whose(there), rows) for x in self._pulled(w, there)[1].get(p, [])]
            dy = [add(a, b) for a, b in zip(dy, part, strict=True)] if dy and part else dy or part
        return dy

    def _pull(self, p: int, kept: Kept) -> tuple[Back | None, dict[int, Leaves]]:
        rows = self._whose(kept)
        sizes = self.sizes_of(rows)
        if p in self.ladder_of:  # asked for by what is below the lowest
            wire, view = self.plan.graph.nodes[p].wire, self.plan.nodes[p].input
            return None, self.segment.distribute(wire, view, self.ladder(p).below, sizes) if parents(wire) else {}
        dy = self._arriving(p, kept, rows)
        if p not in rows and all(x is None for x in dy):
            return None, {}
        node, vertex = _simple(self.segment.nodes[p]), self.plan.graph.nodes[p]
        upto, recurrence = "input" if parents(vertex.wire) else "carry", self.recurrence(p, kept)
        if rows == (p,) and recurrence is Past.LOCAL:
            back = back_units(node, upto)
        else:
            end = self._unit_vectors(p, rows) if p in rows else []
            back = node.back(recurrence, dy, end, sizes["r"], upto)
        if upto == "carry":
            return back, {}
        return back, self.segment.distribute(vertex.wire, self.plan.nodes[p].input, back.input, sizes)

    def _as_rows(self, x: Lifted | None, rows: tuple[int, ...], wanted: tuple[int, ...]) -> Lifted | None:
        if x is None or rows == wanted:
            return x
        axes = "".join(a for a in "crb" if a in x.axes or a == "r")
        full = broadcast(x, axes, self.sizes_of(rows))
        return Lifted(self.moved(full, axes.index("r"), rows, wanted), axes)

    def _unit_vectors(self, p: int, rows: tuple[int, ...]) -> Leaves:
        view = self.plan.nodes[p].carry
        start = sum(self.plan.nodes[v].carry.size for v in rows if v < p)
        vectors = np.eye(self.sizes_of(rows)["r"], view.size, -start) * (p in rows)
        ends = np.cumsum(view.sizes)[:-1]
        parts = zip(np.split(vectors, ends, axis=1), view.shapes, view.dtypes, strict=True)
        return [Lifted(jnp.asarray(x.reshape(-1, *shape), dtype), "r") for x, shape, dtype in parts]


def _simple(part: NodeSegment | DeepSegment) -> NodeSegment:
    assert isinstance(part, NodeSegment)  # see applies()
    return part


def _inside(segment: Segment, flow: JointFlow, k: int) -> jax.Array:
    """What the segment's own steps add to T^k."""
    plan, wanted = segment.plan, targets_of(segment.plan, k)
    back, rows = flow.rows(k, kept_by(plan, k))
    part, sizes = segment.nodes[k], flow.sizes_of(wanted)
    if back is None or not isinstance(part, NodeSegment):
        return jnp.zeros((sizes["b"], sizes["r"], plan.columns[k]), plan.dtype)
    if rows != wanted:

        def those(x: Lifted | None) -> Lifted | None:
            return x if x is None or "r" not in x.axes else flow._as_rows(x, rows, wanted)

        back = Back(back.start, [those(x) for x in back.steps], [those(x) for x in back.output], [])
    found = part.parameters(back, "rb", sizes)
    sizes_of = plan.nodes[k].params.sizes
    return jnp.concatenate([rows_of(found[i], sizes_of[i], sizes, plan.dtype) for i in plan.trained[k]], axis=-1)


def _jacobian(
    segment: Segment, flow: JointFlow, k: int, wanted: tuple[int, ...], known: dict[tuple, jax.Array]
) -> jax.Array:
    """J^k, (batch, rows, rows); ``known`` holds those of other sources, which it may be the last part of."""
    plan, kept = segment.plan, kept_by(segment.plan, k)
    key = tuple((p, within(kept, flow.above[p])) for p in wanted)
    size = flow.sizes_of(wanted)["r"]
    for other, matrix in known.items():
        if other[len(other) - len(key) :] == key:
            return matrix[:, matrix.shape[1] - size :, matrix.shape[2] - size :]
    panels = []
    for p in wanted:
        if p in flow.ladder_of:
            nodes = flow.ladder_of[p]
            if p in (nodes[0], wanted[0]):  # from here on all of the ladder
                every = jnp.moveaxis(flow.ladder(p).start[nodes.index(p) :], 0, 2)
                panels.append(flow.moved(every.reshape(*every.shape[:2], -1), 1, rows_of_source(plan, p), wanted))
            continue
        back, rows = flow.rows(p, kept)
        if back is None or not back.start:
            panels.append(jnp.zeros((flow.sizes["b"], size, plan.nodes[p].carry.size), plan.dtype))
            continue
        start = start_of(segment, p, back, "rb", flow.sizes_of(rows))
        panels.append(jnp.swapaxes(flow.moved(start, 0, rows, wanted), 0, 1))
    known[key] = jnp.concatenate(panels, axis=-1)
    return known[key]
