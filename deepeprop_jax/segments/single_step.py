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

from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr.batched import Lifted, broadcast
from deepeprop_jax.jaxpr.program import is_variable
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments.kept import kept_by
from deepeprop_jax.segments.network import Flow, Segment, prepare, start_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.local import Outer, advance_in_place, computed_once, contract
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import Traces


class Factors(NamedTuple):
    """What moves a node's own local traces.

    Attributes:
      recurrence: D, (batch, K, K, units); None without own traces.
      additions: per block of the trace dF/dtheta, as an outer product or as (batch, K, |leaf|).
    """

    recurrence: jax.Array | None
    additions: list[Outer | jax.Array]


def applies(plan: Plan) -> bool:
    """Whether a step's trace update is kept as factors: all traces are own ones, local and whole.

    What moves dense rows, or influences across nodes, is larger than the parameters that it follows from.
    """
    blocks = [block for own in plan.own for block in own]
    own_alone = plan.rank is None and not plan.pairs and all(vertex.depth is None for vertex in plan.graph.nodes)
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
    for v, (blocks, (recurrence, additions)) in enumerate(zip(plan.own, factors, strict=True)):
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
    return new


def gradient(step: Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
    """``inst + lambda_{t-1} . S_{t-1}`` per node and real parameter leaf, in the traces' dtype.

    Args:
      step: the last one.
      traces: of the step before it.
      dy: (batch, ...) cotangent of the outputs, in ``jax.grad``'s convention.
    """
    plan, sizes = step.plan, step.sizes
    flow = Flow(step, [Lifted(leaf[None], "cb") for leaf in plan.output.split_cotangent(dy)])
    found = []
    for k, node in enumerate(plan.nodes):
        back = flow.through(k, kept_by(plan, k))
        grads = [jnp.zeros(shape, plan.dtype) for shape in node.params.shapes]
        if isinstance(back, Back) and plan.trained[k]:
            inside = _node(step, k).parameters(back, "", sizes)
            for i in plan.trained[k]:
                x = inside[i]
                grads[i] = grads[i] if x is None else x.value.astype(plan.dtype)
            if back.start and plan.name(k, k) in traces:
                by_unit = computed_once(to_grid(start_of(step, k, back, "b", sizes), node.units))
                for block, trace in zip(plan.own[k], traces[plan.name(k, k)], strict=True):
                    (leaf,) = block.leaves
                    grads[leaf] = grads[leaf] + contract(block, node.params.shapes[leaf], by_unit, trace)
        found.append(grads)
    return found


# --- what moves a trace ----------------------------------------------------------------------------------------------


def factors_of(step: Segment) -> list[Factors]:
    """What a step adds to the traces and how it moves them, per node."""
    return [_factors(step, v) for v in range(len(step.plan.nodes))]


def _node(step: Segment, v: int) -> NodeSegment:
    part = step.nodes[v]
    assert isinstance(part, NodeSegment)  # see applies()
    return part


def _factors(step: Segment, v: int) -> Factors:
    plan, part, sizes = step.plan, _node(step, v), step.sizes
    node, program = plan.nodes[v], part.program
    recurrence, deltas, whole = [], [], []
    for slot in range(node.units.slots if plan.own[v] else 0):
        back = part.back_slot(slot)
        recurrence.append(to_grid(start_of(step, v, back, "b", sizes), node.units))
        deltas.append(part.linear_values(program.to_params, back.steps))
        whole.append(part.parameters(back, "b", sizes))
    if not recurrence:
        return Factors(None, [])  # not an array without entries: checkpoints refuse those

    def vector(x: Lifted) -> jax.Array:
        return broadcast(x, "cb", sizes)[0].astype(plan.dtype)

    def flat(x: Lifted | None, size: int) -> jax.Array:
        zeros = jnp.zeros((sizes["b"], size), plan.dtype)
        return zeros if x is None else broadcast(x.flat(), "b", sizes).astype(plan.dtype)

    cut = {output: i for i, output in enumerate(program.cuts.variables)}
    additions: list[Outer | jax.Array] = []
    for block in plan.own[v]:
        (leaf,) = block.leaves
        output = program.cuts.outputs[leaf]
        found = cut.get(output) if is_variable(output) else None
        product = None if found is None else program.cuts.products[found]
        values = [] if found is None else [d[found] for d in deltas]
        if product is not None and product.is_outer and all(d is not None for d in values):
            linear = jnp.stack([vector(d) for d in values if d is not None], axis=1)
            other = vector(part.read(product.equation.inputs[1 - product.side]))[:, None]
            first_is_linear = (product.side == 0) != product.swapped
            additions.append(Outer(linear, other) if first_is_linear else Outer(other, linear))
        else:
            additions.append(jnp.stack([flat(row[leaf], node.params.sizes[leaf]) for row in whole], axis=1))
    return Factors(jnp.stack(recurrence, axis=1), additions)
