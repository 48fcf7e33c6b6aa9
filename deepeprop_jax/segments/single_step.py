"""One step of a stream: a segment of length one, whose own local traces are read once and written in place.

    S_t  = D S_{t-1} + z (x) psi                          eq. 6; one read and one write of the trace
    grad = inst + sum of lambda_{t-1} . S_{t-1}           eq. 4; one read

z is what a weight is multiplied by, psi the derivative of the new carry by that product: (x) is never held. D, z and
psi wait in the state until the next step, so that the traces never mix the parameters of two steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import Lifted, broadcast
from deepeprop_jax.jaxpr.program import is_variable
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments.network import Segment, prepare
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.own import immediate, shown_now, slot_rows
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces import filtered
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.local import Outer, advance_in_place, join, split
from deepeprop_jax.traces.plan import Plan, Traces


class Factors(NamedTuple):
    """What moves a node's own local traces.

    Attributes:
      recurrence: D, (batch, K, K, units); None without own traces.
      additions: per block of the trace dF/dtheta, as an outer product or as (batch, K, |leaf|).
      shown: (batch, K, units) dg/dh_t, where a node above filters the output.
    """

    recurrence: jax.Array | None
    additions: list[Outer | jax.Array]
    shown: jax.Array | None = None


def applies(plan: Plan) -> bool:
    """Whether a step's trace update is kept as factors: all traces are own ones, local and whole, or filtered ones.

    What moves dense rows, or influences across nodes, is larger than the parameters that it follows from.
    """
    blocks = [block for own in plan.own for block in own]
    # Of a source without a carry what a step adds is larger than the parameters that it follows from.
    factored = {pair for pair in plan.filtered if plan.nodes[pair[1]].recurrent}
    own_alone = plan.rank is None and plan.projection is None and plan.pairs.keys() == factored
    own_alone = own_alone and all(vertex.depth is None for vertex in plan.graph.nodes)
    return own_alone and bool(blocks) and all(block.kind is Rows.LOCAL for block in blocks)


def run_step(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Segment:
    """A step as a segment of length one."""
    ready = prepare(plan, params)
    return Segment(ready, carry, carry, jax.tree.map(lambda leaf: leaf[None], x), Flags(None, None))


def advance(plan: Plan, active: jax.Array, factors: list[Factors], traces: Traces) -> Traces:
    """The traces one step on, for the examples that are active: (batch,).

    Args:
      active: elsewhere a trace stays as it is, whatever the factors are.
      factors: of the pending step, per node.
      traces: of the step before it.
    """
    new = {}
    for v, (blocks, (recurrence, additions, _)) in enumerate(zip(plan.own, factors, strict=True)):
        name = plan.name(v, v)
        if name not in traces or recurrence is None:
            continue
        still = jnp.eye(plan.nodes[v].units.slots, dtype=plan.dtype)[None, :, :, None]
        recurrence = jnp.where(active[:, None, None, None], recurrence, still)
        own = []
        for block, addition, trace in zip(blocks, additions, traces[name], strict=True):
            added = jax.tree.map(lambda x: jnp.where(active.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), addition)
            shape = plan.nodes[v].params.shapes[block.leaves[0]]
            own.append(advance_in_place(block, shape, recurrence, added, trace))
        new[name] = tuple(own)
    return new | {plan.name(w, v): _filtered(plan, w, v, active, factors[v], new, traces) for w, v in plan.filtered}


def _filtered(
    plan: Plan, w: int, v: int, active: jax.Array, factors: Factors, new: Traces, traces: Traces
) -> tuple[jax.Array, ...]:
    """The filtered trace one step on, ``κ F + Y``, from the source's own trace after the step."""
    kind, held = plan.filtered[w, v], traces[plan.name(w, v)]
    assert factors.shown is not None  # see factors_of()
    decays = [jnp.where(active, jnp.asarray(decay, plan.dtype), 1) for decay in kind.decays]
    shown = [jnp.where(active[:, None, None], factors.shown, 0)] * len(kind.decays)
    found = []
    for block, own, trace in zip(plan.own[v], new[plan.name(v, v)], held, strict=True):
        shape = plan.nodes[v].params.shapes[block.leaves[0]]
        old = split(block._replace(rows=len(decays)), shape, trace)
        found.append(join(filtered.moved(block, decays, shown, split(block, shape, own), [None] * len(shown), old)))
    return tuple(found)


def factors_of(step: Segment) -> list[Factors]:
    """What a step adds to the traces and how it moves them, per node."""
    plan = step.plan
    # Not an array without entries where a node has no trace: checkpoints refuse those.
    return [_factors(step, v) if plan.own[v] else Factors(None, []) for v in range(len(plan.nodes))]


def _factors(step: Segment, v: int) -> Factors:
    plan, part, sizes = step.plan, step.nodes[v], step.sizes
    assert isinstance(part, NodeSegment)  # see applies()
    program = part.program
    rows = slot_rows(part, plan.dtype)
    deltas = [part.linear_values(program.to_params, part.back_slot(slot).steps) for slot in range(len(rows))]

    def vector(x: Lifted) -> jax.Array:
        return broadcast(x, "cb", sizes)[0].astype(plan.dtype)

    cut = {output: i for i, output in enumerate(program.cuts.variables)}
    additions: list[Outer | jax.Array] = []
    for block in plan.own[v]:
        output = program.cuts.outputs[block.leaves[0]]
        found = cut.get(output) if is_variable(output) else None
        product = None if found is None else program.cuts.products[found]
        values = [] if found is None else [d[found] for d in deltas]
        if product is not None and product.is_outer and all(d is not None for d in values):
            linear = jnp.stack([vector(d) for d in values if d is not None], axis=1)
            other = vector(part.read(product.equation.inputs[1 - product.side]))[:, None]
            first_is_linear = (product.side == 0) != product.swapped
            additions.append(Outer(linear, other) if first_is_linear else Outer(other, linear))
        else:
            additions.append(immediate(rows, block, sizes, plan.dtype))
    shown = shown_now(part, plan.dtype) if any(source == v for _, source in plan.filtered) else None
    return Factors(jnp.stack([row.start for row in rows], axis=1), additions, shown)
