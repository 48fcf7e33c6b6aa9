"""Where a weight's gradient is a product: the VJP's parameter part, cut so that sums over time are matrix products.

    theta_bar = after(products z * delta, sums delta)

z comes from the forward pass, delta is linear in the cotangent, and ``after`` is linear and the same at every step, so
sums over steps and examples commute with it: one matrix product per weight and segment, whatever rearranges the weights
afterwards (transposes, concatenated kernels, weight norm, a weight used twice).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.batched import Lifted, pull, union
from deepeprop_jax.jaxpr.program import Atom, Equation, Variable, dot_axes, is_variable, shape_of
from deepeprop_jax.jaxpr.real_leaves import float32_or_wider


class Product(NamedTuple):
    """A ``dot_general`` of something from the forward pass with something linear in the cotangent.

    Attributes:
      equation: the dot.
      side: which of its operands is linear.
      swapped: whether the transpose of the (two-dimensional) product is wanted instead.
    """

    equation: Equation
    side: int
    swapped: bool = False


class Cuts(NamedTuple):
    """A node's parameter gradient, cut.

    Attributes:
      variables: what is summed over time.
      products: per variable its product; None where the variable itself is summed.
      after: equations from the sums to the parameters.
      outputs: the parameters' cotangents.
    """

    variables: list[Variable]
    products: list[Product | None]
    after: list[Equation]
    outputs: list[Atom]

    def linear(self) -> list[Atom]:
        """What has to be known of the linear program: every delta."""
        pairs = zip(self.variables, self.products, strict=True)
        return [v if p is None else p.equation.inputs[p.side] for v, p in pairs]


def is_outer(product: Product) -> bool:
    """Whether a product of two vectors has an entry for every pair of theirs."""
    axes = dot_axes(product.equation)
    vectors = all(len(shape_of(atom)) == 1 for atom in product.equation.inputs)
    return vectors and not axes.lhs_contract and not axes.lhs_batch


def find_cuts(
    equations: Sequence[Equation], outputs: Sequence[Atom], linear: set[Variable], step: set[Variable]
) -> Cuts:
    """Cut the parameter part of a VJP.

    Args:
      equations: of the whole VJP.
      outputs: cotangents of the parameters.
      linear: variables that depend on the cotangent.
      step: variables that depend on the step, but not on the cotangent.
    """
    producer = {output: equation for equation in equations for output in equation.outputs}
    product: dict[Variable, bool] = {}

    def as_product(equation: Equation | None) -> Product | None:
        if equation is None or equation.name != "dot_general":
            return None
        sides = [side for side in (0, 1) if is_variable(equation.inputs[side]) and equation.inputs[side] in linear]
        if len(sides) == 1 and is_variable(equation.inputs[1 - sides[0]]) and equation.inputs[1 - sides[0]] in step:
            return Product(equation, sides[0])
        return None

    def above_product(atom: Atom) -> bool:
        """Whether a product lies upstream, with nothing that depends on the step in between."""
        if not is_variable(atom) or atom not in linear or atom not in producer:
            return False
        if atom not in product:
            equation = producer[atom]
            between = not any(a in step for a in equation.inputs if is_variable(a))
            product[atom] = as_product(equation) is not None or (between and any(map(above_product, equation.inputs)))
        return product[atom]

    variables: dict[Variable, Product | None] = {}
    after: set[int] = set()

    def visit(atom: Atom) -> None:
        if not is_variable(atom) or atom not in linear or atom in variables:
            return
        equation = producer.get(atom)
        found = as_product(equation)
        if equation is None or found is not None or not above_product(atom):
            variables[atom] = found
        elif id(equation) not in after:
            after.add(id(equation))
            for source in equation.inputs:
                visit(source)

    for atom in outputs:
        visit(atom)
    kept = [equation for equation in equations if id(equation) in after]
    for equation in kept:
        (source, *_), (output, *_) = equation.inputs, equation.outputs
        found = variables.get(source) if is_variable(source) else None
        readers = [e for e in kept if source in e.inputs] + [atom for atom in outputs if atom is source]
        if found is not None and equation.name == "transpose" and len(readers) == 1 and len(shape_of(source)) == 2:
            # Asked for in this order, the product needs no transpose of its operands.
            variables = {output if v is source else v: p for v, p in variables.items()}
            variables[output] = found._replace(swapped=not found.swapped)
    return Cuts(list(variables), list(variables.values()), kept, list(outputs))


def sums(
    cuts: Cuts,
    deltas: Sequence[Lifted | None],
    read: Callable[[Atom], Lifted],
    linear: set[Variable],
    keep: str,
) -> list[Lifted | None]:
    """Parameter cotangents summed over the steps of a segment, and over examples unless ``keep`` has "b".

    Args:
      deltas: values of ``cuts.linear()``; None where zero.
      read: the value of anything that does not depend on the cotangent.
      keep: the axes that stay, "" for a gradient, "rb" for a trace.
    """
    found: dict[Variable, Lifted] = {}
    rearranged = {atom for equation in cuts.after for atom in equation.inputs if is_variable(atom)}
    for variable, product, delta in zip(cuts.variables, cuts.products, deltas, strict=True):
        if delta is None:
            continue
        if product is None:
            found[variable] = _sum(delta, keep)
        else:
            other = read(product.equation.inputs[1 - product.side])
            pair = (delta, other) if product.side == 0 else (other, delta)
            found[variable] = summed_product(product, *pair, keep)
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


def summed_product(product: Product, lhs: Lifted, rhs: Lifted, keep: str) -> Lifted:
    """The dot of two values, summed over their common axes that are not in ``keep``: those are contracted too."""
    equation = product.equation
    axes = dot_axes(equation)
    letters = iter("defghijklmnopqstuvwxyz")
    names = [[""] * len(shape_of(atom)) for atom in equation.inputs]
    for left, right in ((axes.lhs_batch, axes.rhs_batch), (axes.lhs_contract, axes.rhs_contract)):
        for i, j in zip(left, right, strict=True):
            names[0][i] = names[1][j] = next(letters)
    for side, free in enumerate((axes.lhs_free, axes.rhs_free)):
        for i in free:
            names[side][i] = next(letters)
    out = [names[0][i] for i in axes.lhs_batch + axes.lhs_free] + [names[1][i] for i in axes.rhs_free]
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

    def einsum(operands: list[tuple[str, Any]], result: str) -> jax.Array:
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
