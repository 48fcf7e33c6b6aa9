"""One step of one layer: forward, its local partial derivatives, its reverse pass, and the two moves of the lattice.

Every function takes a batch: arrays have a leading batch axis, parameters have none.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.computed import blocks_of
from deepeprop_jax.analysis.node import Node, Reals
from deepeprop_jax.analysis.units import from_grid, to_grid
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.real_leaves import Parts, PyTree, RealView, float32_or_wider
from deepeprop_jax.lattice.output_influence import Influence, Product, add_leaves
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.kinds import advance, push


class Moment(NamedTuple):
    """What one layer saw in one step; all its partial derivatives are taken here.

    Attributes:
      params: no batch axis.
      carry_tm1, carry_t, input: with a leading batch axis.
    """

    params: Parts
    carry_tm1: Parts
    carry_t: Parts
    input: Parts


def forward(node: Node, params: PyTree, carry_tm1: PyTree, x: PyTree) -> tuple[PyTree, PyTree, Moment]:
    """Run the cell on a batch: (carry_t, y_t, moment)."""
    carry_t, y_t = jax.vmap(node.apply, in_axes=(None, 0, 0))(params, carry_tm1, x)
    moment = Moment(
        node.params.split(params), node.carry.split(carry_tm1), node.carry.split(carry_t), node.input.split(x)
    )
    return carry_t, y_t, moment


def local_blocks(node: Node, moment: Moment) -> jax.Array:
    """D: the unit-local blocks of dF/dh, (batch, K, K, units)."""
    params, blocks = moment.params, blocks_of(node)

    def one(h: Parts, u: Parts) -> jax.Array:
        return blocks(params.real, h.real, u.real, (params.other, h.other, u.other))

    return jax.vmap(one)(moment.carry_tm1, moment.input)


class LayerGradient(NamedTuple):
    """The reverse pass through one layer within one step.

    Attributes:
      params: instantaneous gradient of each real parameter leaf, summed over the batch.
      carry: (batch, n) cotangent of the incoming carry; None without a carry.
      input: cotangents of the real input leaves.
    """

    params: Reals
    carry: jax.Array | None
    input: Reals


def reverse(node: Node, moment: Moment, blocks: jax.Array | None, dy: Reals) -> LayerGradient:
    """Pull a cotangent of the output back to parameters, incoming carry and input.

    Parameters stay without a batch axis, so that their gradient is one matrix product over the batch. The cotangent of
    the incoming carry goes through D where ``blocks`` are given (deep e-prop), else through the full dF/dh.
    """
    p, h_tm1, h_t, u = moment

    def output_map(p_real: Reals, h_t_real: Reals, h_tm1_real: Reals, u_real: Reals) -> Reals:
        def one(h_t_real, h_tm1_real, u_real, h_tm1_other, u_other, h_t_other, point):
            others = (p.other, h_tm1_other, u_other)
            return node.cut.output_map(p_real, h_t_real, h_tm1_real, u_real, others, h_t_other, point)

        point = (h_t.real, h_tm1.real)
        return jax.vmap(one)(h_t_real, h_tm1_real, u_real, h_tm1.other, u.other, h_t.other, point)

    y, pull_output = jax.vjp(output_map, p.real, h_t.real, h_tm1.real, u.real)
    dp, dh_t, dh_tm1, du = pull_output(_cast_like(dy, y))
    if not node.recurrent:
        return LayerGradient(dp, None, du)

    def next_carry(p_real: Reals, h_real: Reals, u_real: Reals) -> Reals:
        def one(h_real, u_real, h_other, u_other, point):
            return node.cut.next_carry(p_real, h_real, u_real, (p.other, h_other, u_other), point)

        return jax.vmap(one)(h_real, u_real, h_tm1.other, u.other, h_tm1.real)

    if blocks is None:
        _, pull_carry = jax.vjp(next_carry, p.real, h_tm1.real, u.real)
        dp_carry, dh_carry, du_carry = pull_carry(dh_t)
        carry = node.carry.flatten(dh_carry, leading=1)
    else:
        _, pull_carry = jax.vjp(lambda p_real, u_real: next_carry(p_real, h_tm1.real, u_real), p.real, u.real)
        dp_carry, du_carry = pull_carry(dh_t)
        grid = to_grid(node.carry.flatten(dh_t, leading=1), node.units)
        carry = from_grid(jnp.einsum("bru,brsu->bsu", grid, blocks), node.units)
    carry = carry + node.carry.flatten(dh_tm1, leading=1)
    return LayerGradient(jax.tree.map(jnp.add, dp, dp_carry), carry, jax.tree.map(jnp.add, du, du_carry))


class Partials(NamedTuple):
    """The partial derivatives of one layer in one step; None where nothing asks for them.

    Attributes:
      carry: dF/dh, unit-local blocks (batch, K, K, units) or the full Jacobian (batch, n, n).
      own: dF/dtheta per own block, (batch, rows, columns).
      input: dF/du, (batch, n, inputs).
      output_carry_t: dg/dh_t, (batch, outputs, n); None also where y_t selects components of h_t.
      output_carry_tm1: dg/dh_tm1.
      output_input: dg/du, (batch, outputs, inputs).
      output_params: dg/dtheta per trained leaf, (batch, outputs, columns of the leaf).
    """

    carry: jax.Array | None = None
    own: tuple[jax.Array, ...] = ()
    input: jax.Array | None = None
    output_carry_t: jax.Array | None = None
    output_carry_tm1: jax.Array | None = None
    output_input: jax.Array | None = None
    output_params: dict[int, jax.Array] | None = None


def _cast_like(values: Reals, like: Reals) -> Reals:
    """Each value in the dtype of its counterpart: a cotangent's dtype must be that of the output."""
    return [value.astype(leaf.dtype) for value, leaf in zip(values, like, strict=True)]


class Wanted(NamedTuple):
    """What the layers above and the traces need of a layer's partials.

    Attributes:
      own: blocks of the layer's own trace.
      trained: indices of the trained real parameter leaves.
      input: whether influences of layers below arrive.
      output: whether influences are passed on upward.
      own_output: whether the layer's own influence is among them.
    """

    own: tuple[Block, ...]
    trained: tuple[int, ...]
    input: bool
    output: bool
    own_output: bool


def partials(node: Node, moment: Moment, blocks: jax.Array | None, wanted: Wanted, dtype: jnp.dtype) -> Partials:
    """All partial derivatives that ``wanted`` asks for, in the traces' dtype.

    One VJP with ones on a whole slot gives every unit-local dF/dtheta at once; one VJP per carry component gives the
    dense rows, dF/dh and dF/du; one per output component gives those of g. Reverse mode, because cells with
    ``custom_vjp`` have no forward mode.
    """

    def one(h_tm1: Parts, h_t: Parts, u: Parts) -> Partials:
        others = (moment.params.other, h_tm1.other, u.other)
        p = moment.params.real

        def next_carry(some: dict[int, jax.Array], h: Reals, u_real: Reals) -> Reals:
            params = [some.get(i, leaf) for i, leaf in enumerate(p)]
            return node.cut.next_carry(params, h, u_real, others, h_tm1.real)

        found = Partials()
        if node.recurrent:
            found = _carry_partials(node, next_carry, p, h_tm1.real, u.real, blocks is None, wanted)
        if wanted.output:
            found = _output_partials(node, found, p, h_tm1, h_t, u, others, wanted)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), found)

    found = jax.vmap(one)(moment.carry_tm1, moment.carry_t, moment.input)
    return found if blocks is None else found._replace(carry=blocks)


def _basis_rows(pull, basis: np.ndarray, view: RealView, like: Reals):
    """Pull every row of ``basis`` (cotangents of all real numbers of ``view``) back."""
    cotangents = vary_like(jnp.asarray(basis, float32_or_wider(*(leaf.dtype for leaf in like))), like)
    return jax.vmap(lambda ct: pull(_cast_like(view.unflatten(ct), like)))(cotangents)


def _carry_partials(node: Node, next_carry, p: Reals, h: Reals, u: Reals, full: bool, wanted: Wanted) -> Partials:
    local = {i: p[i] for block in wanted.own if block.kind is Rows.LOCAL for i in block.leaves}
    dense = {i: p[i] for block in wanted.own if block.kind is Rows.DENSE for i in block.leaves}
    rows: dict[int, jax.Array] = {}
    if local:
        out, pull = jax.vjp(lambda some: next_carry(some, h, u), local)
        rows |= _basis_rows(pull, np.eye(node.units.slots)[node.units.slot].T, node.carry, out)[0]
    carry = inputs = None
    if dense or full or wanted.input:
        # Only what is asked for is an argument: the rest is not differentiated.
        asked = {"dense": dense} | ({"h": h} if full else {}) | ({"u": u} if wanted.input else {})
        out, pull = jax.vjp(lambda a: next_carry(a["dense"], a.get("h", h), a.get("u", u)), asked)
        found = _basis_rows(pull, np.eye(node.carry.size), node.carry, out)[0]
        rows |= found["dense"]
        carry = node.carry.flatten(found["h"], leading=1) if full else None
        inputs = _flatten_input(node, found["u"], node.carry.size) if wanted.input else None
    flat = {i: row.reshape(row.shape[0], -1) for i, row in rows.items()}
    own = tuple(jnp.concatenate([flat[i] for i in block.leaves], axis=-1) for block in wanted.own)
    return Partials(carry=carry, own=own, input=inputs)


def _flatten_input(node: Node, rows: Reals, count: int) -> jax.Array:
    return node.input.flatten(rows, leading=1) if rows else jnp.zeros((count, 0))


def _output_partials(node: Node, found: Partials, p: Reals, h_tm1: Parts, h_t: Parts, u: Parts, others, wanted: Wanted):
    if node.cut.output_rows is not None:
        return found
    asked: dict[str, object] = {}
    if node.recurrent:
        asked["carry_t"] = h_t.real
        if "carry_tm1" in node.cut.output_uses:
            asked["carry_tm1"] = h_tm1.real
    if wanted.input and "input" in node.cut.output_uses:
        asked["input"] = u.real
    if wanted.own_output and "params" in node.cut.output_uses:
        asked["params"] = {i: p[i] for i in wanted.trained}

    if not asked:
        return found

    def output_map(a) -> Reals:
        params = [a.get("params", {}).get(i, leaf) for i, leaf in enumerate(p)]
        h_t_real, h_tm1_real = a.get("carry_t", h_t.real), a.get("carry_tm1", h_tm1.real)
        point = (h_t.real, h_tm1.real)
        return node.cut.output_map(params, h_t_real, h_tm1_real, a.get("input", u.real), others, h_t.other, point)

    out, pull = jax.vjp(output_map, asked)
    rows = _basis_rows(pull, np.eye(node.output.size), node.output, out)[0]
    flat = {
        name: view.flatten(rows[name], leading=1)
        for name, view in (("carry_t", node.carry), ("carry_tm1", node.carry))
        if name in rows
    }
    params = {i: row.reshape(row.shape[0], -1) for i, row in rows.get("params", {}).items()}
    return found._replace(
        output_carry_t=flat.get("carry_t"),
        output_carry_tm1=flat.get("carry_tm1"),
        output_input=_flatten_input(node, rows["input"], node.output.size) if "input" in rows else None,
        output_params=params or None,
    )


# --- the two moves of the lattice ------------------------------------------------------------------------------------


def own_influence(
    node: Node, partial: Partials, blocks: tuple[Block, ...], traces_tm1: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """A layer's influence of its own parameters, one step to the right.

    S^{k,k}_t = dF/dh S^{k,k}_{t-1} + dF/dtheta
    """
    return tuple(
        advance(node, block, partial.carry, trace_tm1) + immediate
        for block, trace_tm1, immediate in zip(blocks, traces_tm1, partial.own, strict=True)
    )


def own_output(
    node: Node, partial: Partials, wanted: Wanted, traces_tm1: tuple[jax.Array, ...], traces_t: tuple[jax.Array, ...]
) -> Influence:
    """What a layer's output owes to its own parameters.

    Y^{k,k}_t = dg/dh_t S^{k,k}_t + dg/dh_{t-1} S^{k,k}_{t-1} + dg/dtheta
    """
    leaves = dict(partial.output_params or {})
    products: list[Product] = []
    rows = node.cut.output_rows
    for block, trace_tm1, trace_t in zip(wanted.own, traces_tm1, traces_t, strict=True):
        parts = [(partial.output_carry_t if rows is None else rows, trace_t)]
        if partial.output_carry_tm1 is not None:
            parts.append((partial.output_carry_tm1, trace_tm1))
        for matrix, trace in parts:
            if block.kind is Rows.LOCAL:
                products.append(Product(block, matrix, trace))
            else:  # it has no fewer rows than outputs
                columns = push(node, block, matrix, trace) if rows is None else trace[:, rows]
                add_leaves(node.params, block, columns, leaves)
    return Influence(node, wanted.trained, tuple(products), leaves)


class Past(NamedTuple):
    """The kept influence of parameters below, as the step before left it.

    Attributes:
      trace: S^{v,k}_{t-1} of the last columns, (batch, n, kept columns); the columns before them have none.
      mask: (kept columns,) which of those are within the hops, the others are held at zero; None for all.
    """

    trace: jax.Array
    mask: jax.Array | None = None


def cross_influence(
    node: Node, partial: Partials, past: Past | None, from_below: Influence, upward: bool
) -> tuple[jax.Array | None, Influence | None]:
    """The influence of parameters below: up from the layer below, and to the right from the step before.

        S^{v,k}_t = dF/dh S^{v,k}_{t-1} + dF/du U^{v,k}_t
        Y^{v,k}_t = dg/dh_t S^{v,k}_t + dg/dh_{t-1} S^{v,k}_{t-1} + dg/du U^{v,k}_t

    Columns without a past pass on their instantaneous influence, the second term, alone.

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
