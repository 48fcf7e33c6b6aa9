"""A node's program, computed: what depends on the parameters alone, D, and the parameters' gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Cuts, Node, Others, Product, Reals, VjpProgram
from deepeprop_jax.jaxpr.batched import Lifted, Values, pull, union
from deepeprop_jax.jaxpr.program import Atom, Variable, dot_axes, read_by, shape_of, variables
from deepeprop_jax.jaxpr.real_leaves import Parts, RealView, float32_or_wider


def parameter_values(program: VjpProgram, params: Parts) -> Values:
    """Everything that depends on the parameters alone, once per sequence."""
    pairs = [*zip(program.params, params.real, strict=True), *zip(program.params_other, params.other, strict=True)]
    known = {variable: Lifted(value) for variable, value in (*program.program.constants.items(), *pairs)}
    values = Values(program.program.equations, known)
    outputs = (*program.transposed.values(), *program.carry_t, *program.carry_t_other)
    read = dict.fromkeys([*read_by(program.program.equations), *variables(outputs)])
    values.get(v for v in read if v not in program.step and v not in program.linear)
    for transposed, weight in program.transposed.items():
        values.known[transposed] = Lifted(values.read(weight).value.T)
    return values


# --- D: the unit-local blocks of dF/dh, of one example at one step ----------------------------------------------------

Blocks = Callable[[Reals, Reals, Reals, Others], jax.Array]
"""``(params, carry_tm1, input, others) -> (K, K, units)``, entry [r, s, i] = dh_t[r, i] / dh_tm1[s, i]."""


def blocks_from_jacobian(node: Node) -> Blocks:
    """Of the full Jacobian those entries alone, for a cell whose labels do not certify D: n VJPs a step."""

    def blocks(p: Reals, h: Reals, u: Reals, others: Others) -> jax.Array:
        _, vjp = jax.vjp(lambda at: node.cut.next_carry(p, at, u, others, h).real, h)
        view = RealView(h)

        def row(ct: jax.Array) -> jax.Array:
            pairs = zip(view.unflatten(ct), h, strict=True)
            return view.flatten(vjp([part.astype(leaf.dtype) for part, leaf in pairs])[0])

        jacobian = jax.vmap(row)(jnp.eye(view.size, dtype=float32_or_wider(*view.dtypes)))
        padded = jnp.pad(jacobian, ((0, 1), (0, 1)))
        return padded[node.units.grid[:, None], node.units.grid[None]]

    return blocks


# --- the parameters' gradient ----------------------------------------------------------------------------------------


def sums(
    cuts: Cuts,
    deltas: Sequence[Lifted | None],
    read: Callable[[Atom], Lifted],
    linear: set[Variable],
    keep: str,
) -> list[Lifted | None]:
    """Parameter cotangents summed over the steps of a segment, and over examples unless ``keep`` has "b".

    Args:
      deltas: values of ``VjpProgram.to_params``; None where zero.
      read: the value of anything that does not depend on the cotangent.
      keep: the axes that stay, "" for a gradient, "rb" for a trace.
    """
    found: dict[Variable, Lifted] = {}
    rearranged = {*read_by(cuts.after)}
    for variable, product, delta in zip(cuts.variables, cuts.products, deltas, strict=True):
        if delta is None:
            continue
        if product is None:
            found[variable] = _sum(delta, keep)
        else:
            other = read(product.equation.inputs[1 - product.side])
            pair = (delta, other) if product.side == 0 else (other, delta)
            found[variable] = _summed_product(product, *pair, keep)
        if variable in rearranged:
            found[variable] = found[variable].map(lambda x, v=variable: x.astype(v.aval.dtype))
    return pull(cuts.after, found, linear, read, cuts.outputs)


def _sum(x: Lifted, keep: str) -> Lifted:
    summed = tuple(i for i, axis in enumerate(x.axes) if axis not in keep)
    kept = "".join(axis for axis in x.axes if axis in keep)
    dtype = float32_or_wider(x.value.dtype)  # a sum over many steps
    if "r" in kept and summed == (0,):
        # XLA on a CPU sums so large an array over its first axis ten times slower than it multiplies it by ones.
        ones = jnp.ones(x.value.shape[0], dtype)
        return Lifted(jnp.tensordot(ones, x.value.astype(dtype), 1, precision=jax.lax.Precision.HIGHEST), kept)
    return Lifted(x.value.sum(summed, dtype) if summed else x.value, kept)


def _summed_product(product: Product, lhs: Lifted, rhs: Lifted, keep: str) -> Lifted:
    """The dot of two values, summed over their common axes that are not in ``keep``: those are contracted too."""
    equation = product.equation
    left, right = dot_axes(equation)
    letters = iter("defghijklmnopqstuvwxyz")
    names = [[""] * len(shape_of(atom)) for atom in equation.inputs]
    for i, j in zip(left.batch + left.contract, right.batch + right.contract, strict=True):
        names[0][i] = names[1][j] = next(letters)
    for name, side in zip(names, (left, right), strict=True):
        for i in side.free:
            name[i] = next(letters)
    out = [names[0][i] for i in left.batch + left.free] + [names[1][i] for i in right.free]
    kept = "".join(axis for axis in union(lhs.axes, rhs.axes) if axis in keep)
    pairs = zip((lhs, rhs), names, strict=True)
    operands = [(x.axes + "".join(name), x.value) for x, name in pairs]
    if product.swapped:
        out, operands = out[::-1], operands[::-1]
    if not kept and lhs.axes == rhs.axes == "cb":
        # Steps and examples as one axis: XLA on a CPU would copy both operands into another order of the two.
        operands = [
            ("c" + name[2:], value.reshape(value.shape[0] * value.shape[1], *value.shape[2:]))
            for name, value in operands
        ]
    dtype = float32_or_wider(lhs.value.dtype, rhs.value.dtype)

    def einsum(operands: list[tuple[str, jax.Array]], result: str) -> jax.Array:
        (lhs_names, a), (rhs_names, b) = operands
        return jnp.einsum(f"{lhs_names},{rhs_names}->{result}", a, b, preferred_element_type=dtype)

    wanted = kept + "".join(out)
    if kept != "rb" or [("r" in name) for name, _ in operands] == [True, True]:
        return Lifted(einsum(operands, wanted), kept)
    # The operand with rows is by far the larger one: it must not be laid out anew for the product, and as its second
    # factor it is not.
    operands.sort(key=lambda operand: "r" in operand[0])
    few, many = ("".join(a for a in name if a not in "crb") for name, _ in operands)
    order = "b" + "".join(a for a in few if a in out) + "r" + "".join(a for a in many if a in out and a not in few)
    found = einsum(operands, order)
    return Lifted(found.transpose([order.index(axis) for axis in wanted]), kept)
