"""One step of a stream: a segment of length one, whose own local traces are read once and written in place.

    S_t  = D S_{t-1} + z (x) psi                          one read and one write of the trace
    grad = inst + sum of lambda_{t-1} . S_{t-1}           one read

z is what a weight is multiplied by, psi the derivative of the new carry by that product: (x) is never held. D, z and
psi wait in the state until the next step, so that the traces never mix the parameters of two steps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.analysis.outer_products import is_outer
from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.batched import Lifted, broadcast
from deepeprop_jax.jaxpr.program import is_variable
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments.kept import kept_by
from deepeprop_jax.segments.network import Flow, Segment, prepare, start_of
from deepeprop_jax.segments.node import Back, NodeSegment
from deepeprop_jax.segments.through_time import Flags
from deepeprop_jax.traces.block import Block, computed_once, fewest_parts, spread
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.slots import WRITTEN_OUT
from deepeprop_jax.traces.state import Traces


class Outer(NamedTuple):
    """``left (x) right`` per example and slot: (batch, K or 1, rows) and (batch, K or 1, columns)."""

    left: jax.Array
    right: jax.Array


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
    return own_alone and bool(blocks) and all(block.kind == "local" for block in blocks)


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
            own.append(_advance(block, shape, recurrence, added, trace))
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
                    grads[leaf] = grads[leaf] + _contract(block, node.params.shapes[leaf], by_unit, trace)
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
        if product is not None and is_outer(product) and all(d is not None for d in values):
            linear = jnp.stack([vector(d) for d in values if d is not None], axis=1)
            other = vector(part.read(product.equation.inputs[1 - product.side]))[:, None]
            first_is_linear = (product.side == 0) != product.swapped
            additions.append(Outer(linear, other) if first_is_linear else Outer(other, linear))
        else:
            additions.append(jnp.stack([flat(row[leaf], node.params.sizes[leaf]) for row in whole], axis=1))
    return Factors(jnp.stack(recurrence, axis=1), additions)


def _advance(
    block: Block, shape: tuple[int, ...], recurrence: jax.Array, addition: Outer | jax.Array, trace: jax.Array
) -> jax.Array:
    """``D S + dF/dtheta`` of one leaf, (batch, K, |leaf|)."""
    axis = _unit_axis(block, shape)
    if isinstance(addition, Outer):
        if axis is not None and shape[0] > 1 and trace.size > _IN_ONE_PIECE:
            # The carry may have other units too, of leaves of another shape.
            return _advance_in_place((shape[0], shape[1]), axis, recurrence[..., : shape[axis]], addition, trace)
        addition = (addition.left[..., :, None] * addition.right[..., None, :]).reshape(trace.shape)
    wide = spread(recurrence, block.unit)
    rows = [_sum([wide[:, r, k] * trace[:, k] for k in range(block.rows)]) for r in range(block.rows)]
    return jnp.stack(rows, axis=1) + addition


_IN_ONE_PIECE = 2**9
"""Up to this many numbers a trace is moved without a loop, which is as fast and compiles in a fraction of the time."""


def _unit_axis(block: Block, shape: tuple[int, ...]) -> int | None:
    """The axis of a matrix along which its entries reach all units in turn; None if neither."""
    if len(shape) != 2 or block.unit is None:
        return None
    held = thin.core(thin.compact(block.unit.reshape(shape)))
    for axis in (1, 0):
        if held.shape[axis] == held.size and np.array_equal(held.ravel(), np.arange(shape[axis])):
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
