"""One step of a stream: a segment of length one, whose own local traces are read once and written in place.

    S_t  = D S_{t-1} + z (x) psi                          one read and one write of the trace
    grad = inst + sum of lambda_{t-1} . S_{t-1}           one read

z is what a weight is multiplied by, psi the derivative of the new carry by that product: (x) is never held.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax import segment as sg
from deepeprop_jax.cell import PyTree
from deepeprop_jax.jaxprs import is_variable
from deepeprop_jax.lattice import Traces
from deepeprop_jax.learner import Pending
from deepeprop_jax.lifted import Lifted, broadcast
from deepeprop_jax.node import to_grid
from deepeprop_jax.node_segment import Back, NodeSegment
from deepeprop_jax.outer import is_outer
from deepeprop_jax.plan import Plan
from deepeprop_jax.slots import WRITTEN_OUT
from deepeprop_jax.through_time import Flags
from deepeprop_jax.trace import Block, add_columns, computed_once, contract, fewest_parts, spread
from deepeprop_jax.vjp_program import VjpProgram


class Outer(NamedTuple):
    """``left (x) right`` per example and slot: (batch, K or 1, rows) and (batch, K or 1, columns)."""

    left: jax.Array
    right: jax.Array


class Factors(NamedTuple):
    """What moves a node's own local traces.

    Attributes:
      recurrence: D, (batch, K, K, units).
      additions: per real parameter leaf dF/dtheta, as an outer product or as (batch, K, |leaf|).
    """

    recurrence: jax.Array
    additions: list[Outer | jax.Array]


def applies(plan: Plan) -> bool:
    """Whether this is the faster way: nothing is kept across nodes, and something of the own traces is local and whole.

    A step with influences across nodes costs less on the lattice, which has their products only once.
    """
    local = any(block.kind == "local" for blocks in plan.own for block in blocks)
    return local and plan.rank is None and not plan.pairs and all(vertex.depth is None for vertex in plan.graph.nodes)


def pending_step(plan: Plan, programs: tuple[VjpProgram, ...], pending: Pending) -> sg.Segment:
    """The pending step as a segment of length one."""
    ready = sg.prepare(plan, programs, pending.params)
    xs = jax.tree.map(lambda leaf: leaf[None], pending.x)
    return sg.Segment(ready, pending.carry, pending.carry, xs, Flags(None, None))


def update(step: sg.Segment, active: jax.Array, traces: Traces, others: Traces | None) -> Traces:
    """The traces one step on, for the examples that are active: (batch,).

    Args:
      step: the pending step.
      active: elsewhere a trace stays as it is.
      traces: of the step before it.
      others: the traces of this step, of which those that are not local are taken; None where all are local.
    """
    plan, new = step.plan, {}
    for v, blocks in enumerate(plan.own):
        name = plan.name(v, v)
        if name not in traces:
            continue
        factors = _factors(step, v, active)
        own = list(traces[name] if others is None else others[name])
        for i, (block, trace) in enumerate(zip(blocks, traces[name], strict=True)):
            if block.kind == "local":
                (leaf,) = block.leaves
                shape, addition = plan.nodes[v].params.shapes[leaf], factors.additions[leaf]
                own[i] = _advance(block, shape, factors.recurrence, addition, trace)
        new[name] = tuple(own)
    return new


def gradient(step: sg.Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
    """``inst + lambda_{t-1} . S_{t-1}`` per node and real parameter leaf, in the traces' dtype.

    Args:
      step: the pending step.
      traces: of the step before it.
      dy: (batch, ...) cotangent of the outputs, in ``jax.grad``'s convention.
    """
    plan, sizes = step.plan, step.sizes
    flow = sg.Flow(step, [Lifted(leaf[None], "cb") for leaf in plan.output.split_cotangent(dy)])
    found = []
    for k, node in enumerate(plan.nodes):
        back = flow.through(k, frozenset({k}))
        grads = [jnp.zeros(shape, plan.dtype) for shape in node.params.shapes]
        if isinstance(back, Back) and plan.trained[k]:
            inside = _node(step, k).parameters(back, "", sizes)
            for i in plan.trained[k]:
                x = inside[i]
                grads[i] = grads[i] if x is None else x.value.astype(plan.dtype)
            if back.start and plan.name(k, k) in traces:
                start = sg.start_of(step, k, back, "b", sizes)
                by_unit = computed_once(to_grid(start, node.units))
                for block, trace in zip(plan.own[k], traces[plan.name(k, k)], strict=True):
                    if block.kind == "local":
                        (leaf,) = block.leaves
                        grads[leaf] = grads[leaf] + _contract(block, node.params.shapes[leaf], by_unit, trace)
                    else:
                        add_columns(node.params, grads, block.leaves, contract(node, block, start, trace))
        found.append(grads)
    return found


def _node(step: sg.Segment, v: int) -> NodeSegment:
    part = step.nodes[v]
    assert isinstance(part, NodeSegment)  # see applies()
    return part


# --- what moves a trace ----------------------------------------------------------------------------------------------


def _factors(step: sg.Segment, v: int, active: jax.Array) -> Factors:
    """D and dF/dtheta; where an example is not active, one and zero, whatever its pending step would give."""
    plan, part, sizes = step.plan, _node(step, v), step.sizes
    node, program = plan.nodes[v], part.program
    recurrence, deltas, whole = [], [], []
    for slot in range(node.units.slots):
        back = part.back_slot(slot)
        recurrence.append(to_grid(sg.start_of(step, v, back, "b", sizes), node.units))
        deltas.append(part.linear_values(program.to_params, back.steps))
        whole.append(part.parameters(back, "b", sizes))

    def masked(x: jax.Array) -> jax.Array:
        return jnp.where(active.reshape((-1,) + (1,) * (x.ndim - 1)), x.astype(plan.dtype), 0)

    def vector(x: Lifted) -> jax.Array:
        return masked(broadcast(x, "cb", sizes)[0])

    def flat(x: Lifted | None, size: int) -> jax.Array:
        return jnp.zeros((sizes["b"], size), plan.dtype) if x is None else masked(broadcast(x.flat(), "b", sizes))

    cut = {output: i for i, output in enumerate(program.cuts.variables)}
    additions: list[Outer | jax.Array] = []
    for leaf, output in enumerate(program.cuts.outputs):
        found = cut.get(output) if is_variable(output) else None
        product = None if found is None else program.cuts.products[found]
        values = [] if found is None else [d[found] for d in deltas]
        if product is not None and is_outer(product) and all(d is not None for d in values):
            linear = jnp.stack([vector(d) for d in values if d is not None], axis=1)
            other = vector(part.read(product.equation.inputs[1 - product.side]))[:, None]
            first_is_linear = (product.side == 0) != product.swapped
            additions.append(Outer(linear, other) if first_is_linear else Outer(other, linear))
        else:
            rows = [flat(row[leaf], node.params.sizes[leaf]) for row in whole]
            additions.append(jnp.stack(rows, axis=1))
    still = jnp.eye(node.units.slots, dtype=plan.dtype)[None, :, :, None]
    return Factors(jnp.where(active[:, None, None, None], jnp.stack(recurrence, axis=1), still), additions)


def _advance(
    block: Block, shape: tuple[int, ...], recurrence: jax.Array, addition: Outer | jax.Array, trace: jax.Array
) -> jax.Array:
    """``D S + dF/dtheta`` of one leaf, (batch, K, |leaf|)."""
    axis = _unit_axis(block, shape)
    if isinstance(addition, Outer):
        if axis is not None and shape[0] > 1:
            # The carry may have other units too, of leaves of another shape.
            return _advance_in_place((shape[0], shape[1]), axis, recurrence[..., : shape[axis]], addition, trace)
        addition = (addition.left[..., :, None] * addition.right[..., None, :]).reshape(trace.shape)
    wide = spread(recurrence, block.unit)
    rows = [_sum([wide[:, r, k] * trace[:, k] for k in range(block.rows)]) for r in range(block.rows)]
    return jnp.stack(rows, axis=1) + addition


def _unit_axis(block: Block, shape: tuple[int, ...]) -> int | None:
    """The axis of a matrix along which its entries reach all units in turn; None if neither."""
    if len(shape) != 2 or block.unit is None:
        return None
    unit = block.unit.reshape(shape)
    for axis in (1, 0):
        turn = np.arange(shape[axis])
        if np.array_equal(unit, np.broadcast_to(turn if axis == 1 else turn[:, None], shape)):
            return axis
    return None


def _advance_in_place(
    shape: tuple[int, int], axis: int, recurrence: jax.Array, addition: Outer, trace: jax.Array
) -> jax.Array:
    """``D S + left (x) right`` of a matrix, by parts of its rows in a loop.

    On a CPU, XLA runs over (batch, K, |leaf|) with a division per entry, eight times slower than over rows and columns,
    unless the result is handed on as a matrix: to the next turn of a loop. And what a loop reads is computed before it,
    not anew for every entry.
    """
    (batch, slots), (rows, columns) = trace.shape[:2], shape
    # Around an axis of one slot XLA would lay a matrix out anew, and copy the trace: there the parts are single rows.
    by_row = slots == 1 and batch > 1
    parts = rows if by_row else fewest_parts(rows)
    size = rows // parts
    held = trace if by_row else trace.reshape(batch, slots, rows, columns)
    axis_of_parts, step = (-1, columns) if by_row else (-2, size)

    def at(x: jax.Array, part: jax.Array) -> jax.Array:
        """The part's rows of x, (..., size, 1), without the last axis where a row stands alone."""
        piece = lax.dynamic_slice_in_dim(x, part * size, size, axis=-1, allow_negative_indices=False)
        return piece if by_row else piece[..., None]

    def across(x: jax.Array) -> jax.Array:
        return x if by_row else x[..., None, :]

    def body(part: jax.Array, held: jax.Array) -> jax.Array:
        old = lax.dynamic_slice_in_dim(held, part * step, step, axis_of_parts, allow_negative_indices=False)
        wide = across(recurrence) if axis == 1 else at(recurrence, part)
        terms = [wide[:, :, k] * old[:, k : k + 1] for k in range(slots)]
        new = _sum([*terms, at(addition.left, part) * across(addition.right)])
        return lax.dynamic_update_slice_in_dim(held, new, part * step, axis_of_parts, allow_negative_indices=False)

    return lax.fori_loop(0, parts, body, held).reshape(trace.shape)


# --- lambda . S ------------------------------------------------------------------------------------------------------


def _contract(block: Block, shape: tuple[int, ...], cotangent: jax.Array, trace: jax.Array) -> jax.Array:
    """``lambda . S`` summed over the batch: (batch, K, units) and (batch, K, |leaf|) to the leaf's shape."""
    batch, slots = trace.shape[:2]
    wide = spread(cotangent, block.unit)
    if batch > WRITTEN_OUT:
        return jnp.einsum("bkp,bkp->p", wide, trace).reshape(shape)
    # One pass over the trace: XLA fuses the products of a written-out sum, but not those of a reduction over examples.
    return _sum([wide[b, k].reshape(shape) * trace[b, k].reshape(shape) for k in range(slots) for b in range(batch)])


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)
