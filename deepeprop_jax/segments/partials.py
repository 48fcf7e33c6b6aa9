"""The partial derivatives of one layer in one step, and the two moves that they make: right in time, and up (eq. 9).

Every array has a leading batch axis. n is the number of components of the carry. A unit is one index of a carry shape;
its K slots are the carry leaves of that shape. Columns are parameter entries, and a block is columns in one array: with
n rows where dense, with the K rows of the one unit that an entry reaches where local. In ``Lifted`` values axis c is
the step, r the row (of a unit vector that goes back), b the example.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.batched import Lifted
from deepeprop_jax.jaxpr.computed_once import computed_once
from deepeprop_jax.segments.cotangents import rows_of, unit_vectors, vector
from deepeprop_jax.segments.node import NodeSegment
from deepeprop_jax.segments.own import immediate, slot_rows
from deepeprop_jax.segments.through_time import Past
from deepeprop_jax.segments.unit_vectors import back_units
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.kinds import advance, push
from deepeprop_jax.traces.output_influence import Factored, Influence, add_leaves


class Partials(NamedTuple):
    """The partial derivatives of one layer in one step, in the traces' dtype; None where nothing asks for them.

    Attributes:
      carry: ∂F/∂h, unit-local blocks (batch, K, K, units) or the full Jacobian (batch, n, n).
      own: ∂F/∂θ per own block, (batch, rows, columns).
      input: ∂F/∂u, (batch, n, inputs).
      output_carry_t: ∂g/∂h_t, (batch, outputs, n); None also where y_t selects components of h_t.
      output_carry_tm1: ∂g/∂h_{t-1}.
      output_input: ∂g/∂u, (batch, outputs, inputs).
      output_params: ∂g/∂θ per trained leaf, (batch, outputs, columns of the leaf).
    """

    carry: jax.Array | None = None
    own: tuple[jax.Array, ...] = ()
    input: jax.Array | None = None
    output_carry_t: jax.Array | None = None
    output_carry_tm1: jax.Array | None = None
    output_input: jax.Array | None = None
    output_params: dict[int, jax.Array] | None = None


class Wanted(NamedTuple):
    """What the layers above and the traces need of a layer's partials.

    Attributes:
      own: blocks of the layer's own trace.
      trained: indices of the trained real parameter leaves.
      full: whether ∂F/∂h enters in full; else by its unit-local blocks D.
      input: whether influences of layers below arrive.
      output: whether influences are passed on upward.
      own_output: whether the layer's own influence is among them.
    """

    own: tuple[Block, ...]
    trained: tuple[int, ...]
    full: bool
    input: bool
    output: bool
    own_output: bool


def partials(part: NodeSegment, wanted: Wanted, dtype: jnp.dtype) -> Partials:
    """All partial derivatives that ``wanted`` asks for.

    One pull with ones on a whole slot gives every unit-local ∂F/∂θ at once; one with all unit vectors on the carry
    the dense rows, ∂F/∂h and ∂F/∂u; one with those on the output the derivatives of g.

    Args:
      part: the layer, after a segment of one step.
    """
    found = _of_carry(part, wanted, dtype) if part.node.recurrent else Partials()
    if wanted.output and part.node.cut.output_rows is None:
        found = _of_output(part, found, wanted, dtype)
    return found


def _of_carry(part: NodeSegment, wanted: Wanted, dtype: jnp.dtype) -> Partials:
    node, sizes = part.node, part.sizes | {"r": part.node.carry.size}
    every: dict[int, jax.Array] = {}
    carry = inputs = None
    # With the full Jacobian the plan holds own traces with dense rows alone, so that no slot is asked for.
    slots = [] if wanted.full else slot_rows(part, dtype)
    if not wanted.full:
        carry = computed_once(jnp.stack([row.start for row in slots], axis=1))
    dense = any(block.kind is Rows.DENSE for block in wanted.own)
    if dense or wanted.full or wanted.input:
        upto = "input" if wanted.input else "carry"
        if wanted.full:
            back = part.back(Past.FULL, [], unit_vectors(node.carry), node.carry.size, upto)
            carry = _matrix(vector(node.carry, dtype, back.start, "rb", sizes))
        else:
            back = back_units(part, upto)
        inputs = _matrix(vector(node.input, dtype, back.input, "crb", sizes)[0]) if wanted.input else None
        if dense:
            every = _columns(part, part.parameters(back, "rb", sizes), wanted.trained, sizes, dtype)
    own = []
    for block in wanted.own:
        if block.kind is Rows.DENSE:
            own.append(jnp.concatenate([every[i] for i in block.leaves], axis=-1))
        else:
            own.append(immediate(slots, block, sizes, dtype))
    return Partials(carry=carry, own=tuple(own), input=inputs)


def _of_output(part: NodeSegment, found: Partials, wanted: Wanted, dtype: jnp.dtype) -> Partials:
    node, sizes = part.node, part.sizes | {"r": part.node.output.size}
    uses, dy = node.cut.output_uses, unit_vectors(node.output)
    dh_t, dh_tm1, du = part.through_output(dy, sizes)
    params = None
    if wanted.own_output and "params" in uses:
        params = _columns(part, part.output_parameters(dy, "rb", sizes), wanted.trained, sizes, dtype)
    carry_t = carry_tm1 = inputs = None
    if node.recurrent:
        carry_t = _matrix(vector(node.carry, dtype, dh_t, "crb", sizes)[0])
        if "carry_tm1" in uses:
            carry_tm1 = _matrix(vector(node.carry, dtype, dh_tm1, "crb", sizes)[0])
    if wanted.input and "input" in uses:
        inputs = _matrix(vector(node.input, dtype, du, "crb", sizes)[0])
    return found._replace(output_carry_t=carry_t, output_carry_tm1=carry_tm1, output_input=inputs, output_params=params)


def _matrix(rows: jax.Array) -> jax.Array:
    """(rows, batch, any) as (batch, rows, any)."""
    return jnp.swapaxes(rows, 0, 1)


def _columns(
    part: NodeSegment, found: list[Lifted | None], leaves: tuple[int, ...], sizes: dict[str, int], dtype: jnp.dtype
) -> dict[int, jax.Array]:
    """Per parameter leaf (batch, rows, columns)."""
    return {i: rows_of(found[i], part.node.params.sizes[i], sizes, dtype) for i in leaves}


# --- the two moves of the lattice ------------------------------------------------------------------------------------


def own_influence(
    node: Node, partial: Partials, blocks: tuple[Block, ...], traces_tm1: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """A layer's influence of its own parameters, one step to the right.

    S^{k,k}_t = ∂F/∂h S^{k,k}_{t-1} + ∂F/∂θ                      eq. 6; the terminal node of eq. 10
    """
    return tuple(
        advance(node, block, partial.carry, trace_tm1) + added
        for block, trace_tm1, added in zip(blocks, traces_tm1, partial.own, strict=True)
    )


def own_output(
    node: Node, partial: Partials, wanted: Wanted, traces_tm1: tuple[jax.Array, ...], traces_t: tuple[jax.Array, ...]
) -> Influence:
    """What a layer's output owes to its own parameters.

    Y^{k,k}_t = ∂g/∂h_t S^{k,k}_t + ∂g/∂h_{t-1} S^{k,k}_{t-1} + ∂g/∂θ
    """
    leaves = dict(partial.output_params or {})
    products: list[Factored] = []
    rows = node.cut.output_rows
    for block, trace_tm1, trace_t in zip(wanted.own, traces_tm1, traces_t, strict=True):
        parts = [(partial.output_carry_t if rows is None else rows, trace_t)]
        if partial.output_carry_tm1 is not None:
            parts.append((partial.output_carry_tm1, trace_tm1))
        for matrix, trace in parts:
            if block.kind is Rows.LOCAL:
                products.append(Factored(block, matrix, trace))
            else:  # it has no fewer rows than outputs
                columns = push(node, block, matrix, trace) if rows is None else trace[:, rows]
                add_leaves(node.params, block, columns, leaves)
    return Influence(node, wanted.trained, tuple(products), leaves)


class KeptInfluence(NamedTuple):
    """The kept influence of parameters below, as the step before left it.

    Attributes:
      trace: S^{v,k}_{t-1} of the last columns, (batch, n, kept columns); the columns before them have none.
      mask: (kept columns,) which of those are within the hops, the others are held at zero; None for all.
    """

    trace: jax.Array
    mask: jax.Array | None = None


def cross_influence(
    node: Node, partial: Partials, past: KeptInfluence | None, from_below: Influence, upward: bool
) -> tuple[jax.Array | None, Influence | None]:
    """The influence of parameters below: up from the layer below, and to the right from the step before.

        S^{v,k}_t = ∂F/∂h S^{v,k}_{t-1} + ∂F/∂u U^{v,k}_t              eq. 9; the nonterminal node of eq. 10
        Y^{v,k}_t = ∂g/∂h_t S^{v,k}_t + ∂g/∂h_{t-1} S^{v,k}_{t-1} + ∂g/∂u U^{v,k}_t

    Columns run over k's layers from bottom to top. ``hops`` keeps the uppermost, nearest to v, so the kept columns are
    the last. The others only pass through: of them S_t is ∂F/∂u U alone.

    Args:
      past: what is kept of S_{t-1}; None if all columns only pass through.
      from_below: U^{v,k}_t.
      upward: whether Y is needed.

    Returns:
      S_t of the kept columns, (batch, n, kept columns), and Y_t of all columns.
    """
    influence = trace_t = None
    if node.recurrent:
        influence = from_below.through(partial.input)
        if past is not None:
            batch, n, kept = past.trace.shape
            block = Block(Rows.DENSE, (), None, n, kept)
            moved = advance(node, block, partial.carry, past.trace)
            columns = _add_to_last(influence.multiplied_out(batch, n, moved.dtype), moved)
            trace_t = columns[..., columns.shape[-1] - kept :]
            trace_t = trace_t if past.mask is None else jnp.where(past.mask, trace_t, 0)
            influence = Influence(from_below.source, from_below.trained, whole=columns)
    if not upward:
        return trace_t, None
    if node.cut.output_rows is not None and influence is not None:
        # y_t is components of h_t: ∂g/∂h_t selects rows, and the other terms are zero.
        return trace_t, influence.map(lambda part: part[:, node.cut.output_rows])
    output = Influence(from_below.source, from_below.trained)
    if influence is not None:
        output = output.plus(influence.through(partial.output_carry_t))
    if partial.output_input is not None:
        output = output.plus(from_below.through(partial.output_input))
    if partial.output_carry_tm1 is not None and past is not None:
        output = output._replace(
            whole=_add_to_last(output.whole, jnp.einsum("bmn,bnp->bmp", partial.output_carry_tm1, past.trace))
        )
    return trace_t, output


def _add_to_last(columns: jax.Array, part: jax.Array) -> jax.Array:
    """Add to the last columns, as many as ``part`` has."""
    if part.shape[-1] == columns.shape[-1]:
        return columns + part
    return columns.at[..., columns.shape[-1] - part.shape[-1] :].add(part)
