"""D: the unit-local blocks of dF/dh, of one example at one step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis import labels
from deepeprop_jax.analysis.cell_parts import Others, Reals
from deepeprop_jax.analysis.node import Node
from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr.program import backward_slice, dependents, evaluate, is_variable
from deepeprop_jax.jaxpr.real_leaves import RealView, float32_or_wider

Blocks = Callable[[Reals, Reals, Reals, Others], jax.Array]
"""``(params, carry_tm1, input, others) -> (K, K, units)``, entry [r, s, i] = dh_t[r, i] / dh_tm1[s, i]."""


def blocks_of(node: Node) -> Blocks:
    """One pass per slot where labels certify it, else from the full Jacobian."""
    return _by_slot(node) if node.program.localised is not None else from_jacobian(node)


def _by_slot(node: Node) -> Blocks:
    """Where every unit's cotangent stays in the unit, ones on a whole slot give all its blocks in one pass."""
    program, flow, view, units = node.program.program, node.program.localised, node.carry, node.units
    carry_bar, cotangents = node.program.to_carry.outputs, node.program.cotangents
    assert flow is not None
    equations = backward_slice(program.equations, carry_bar)
    rule = labels.localised(flow)
    basis = np.eye(units.slots)[units.slot].T  # (K, n): ones on slot r
    # Only variables that the cotangent reaches run under the slot axis; the others are shared by all slots.
    linear = dependents(equations, cotangents)
    before = [equation for equation in equations if equation.outputs[0] not in linear]
    after = [equation for equation in equations if equation.outputs[0] in linear]
    crossing = list(
        dict.fromkeys(
            atom
            for atom in [a for equation in after for a in equation.inputs] + list(carry_bar)
            if is_variable(atom) and atom not in linear
        )
    )

    def blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
        arguments = [*p, *h, *u, *others[0], *others[1], *others[2]]
        known = {**program.constants, **dict(zip(program.inputs, arguments, strict=False))}
        known |= dict(zip(crossing, evaluate(before, known, crossing), strict=True))

        def slot_row(ct: jax.Array) -> jax.Array:
            cts = [part.astype(leaf.dtype) for part, leaf in zip(view.unflatten(ct), h, strict=True)]
            carry = evaluate(after, known | dict(zip(cotangents, cts, strict=True)), carry_bar, rule)
            return to_grid(view.flatten([jnp.broadcast_to(c, x.shape) for c, x in zip(carry, h, strict=True)]), units)

        return jax.vmap(slot_row)(jnp.asarray(basis, float32_or_wider(*(leaf.dtype for leaf in h))))

    return blocks


def from_jacobian(node: Node) -> Blocks:
    """Of the full Jacobian those entries alone."""

    def blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
        _, vjp = jax.vjp(lambda at: node.cut.next_carry(p, at, u, others, h), h)
        view = RealView(h)

        def row(ct: jax.Array) -> jax.Array:
            pairs = zip(view.unflatten(ct), h, strict=True)
            return view.flatten(vjp([part.astype(leaf.dtype) for part, leaf in pairs])[0])

        jacobian = jax.vmap(row)(jnp.eye(view.size, dtype=float32_or_wider(*view.dtypes)))
        padded = jnp.pad(jacobian, ((0, 1), (0, 1)))
        return padded[node.units.grid[:, None], node.units.grid[None]]

    return blocks
