"""A network's step whose weights' influence on the carry is a Kronecker product: what KF-RTRL and OK are made of.

A weight W that enters as one product a = z W, and nowhere else, has the influence ∂h_t/∂W = z_t ⊗ B_t on the carry
after this step, with B_t = ∂h_t/∂a_t: row i of it is the outer product of z_t and row i of B_t. Vectors and scalars are
no such product. Their influence is as large as one B, and is kept whole:

    S_t  =  D_t S_{t-1}  +  ∂F/∂θ                  D_t = ∂h_t/∂h_{t-1}, of the whole network
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.batched import bind, evaluate
from deepeprop_jax.jaxpr.program import Equation, Program, Variable, dependents, dot_axes, shape_of
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.rules.flat import number_type, vector


class Product(NamedTuple):
    """Where a weight enters.

    Attributes:
      leaf: its place among the real leaves of params.
      equation: the product.
      side: which operand the weight is.
      contracted: which axis of the weight meets z.
    """

    leaf: int
    equation: Equation
    side: int
    contracted: int

    @property
    def inputs(self) -> int:
        """Length of z."""
        return shape_of(self.equation.inputs[self.side])[self.contracted]

    @property
    def outputs(self) -> int:
        """Length of a."""
        return shape_of(self.equation.inputs[self.side])[1 - self.contracted]

    def gradient(self, z: jax.Array, delta: jax.Array) -> jax.Array:
        """z ⊗ delta, shaped as the weight."""
        return jnp.outer(z, delta) if self.contracted == 0 else jnp.outer(delta, z)


class Structure(NamedTuple):
    """A network's step as a program of (params, carry, x), real and other leaves each, and how its parameters enter.

    Attributes:
      program: its outputs are the real leaves of the new carry.
      products: the weights that reach the carry.
      whole: the other real leaves of params that reach it, by their places.
      params, carry, x: views.
    """

    program: Program
    products: list[Product]
    whole: list[int]
    params: RealView
    carry: RealView
    x: RealView

    @property
    def numbers(self) -> int:
        """Of the parameters that are kept whole."""
        return sum(self.params.sizes[leaf] for leaf in self.whole)


class Factors(NamedTuple):
    """A step of one example.

    Attributes:
      D: (n, n) ∂h_t/∂h_{t-1}.
      z, B: per product, (inputs,) and (n, outputs).
      whole: (n, numbers) ∂h_t by the parameters that are kept whole.
    """

    D: jax.Array
    z: list[jax.Array]
    B: list[jax.Array]
    whole: jax.Array


def structure_of(name: str, cell: Cell, params: PyTree, carry: PyTree, x: PyTree) -> Structure:
    """How each parameter enters the step of one example.

    Raises:
      ValueError: a matrix that reaches the carry otherwise than by one product with a vector, with its path.
    """
    views = RealView(params), RealView(carry), RealView(x)
    view_p, view_h, _ = views

    def next_carry(*parts: list[jax.Array]) -> list[jax.Array]:
        trees = [view.join(*part) for view, part in zip(views, (parts[:2], parts[2:4], parts[4:]), strict=True)]
        return view_h.split(cell.apply(*trees)[0]).real

    avals = [group for view in views for group in (view.real_avals, view.other_avals)]
    program = trace(next_carry, *avals)
    products, whole = [], []
    for leaf, (variable, path) in enumerate(zip(program.inputs, view_p.names, strict=False)):
        if dependents(program.equations, [variable]).isdisjoint(a for a in program.outputs if isinstance(a, Variable)):
            continue
        found = _product(leaf, variable, program)
        if found is not None:
            products.append(found)
        elif len(view_p.shapes[leaf]) < 2:
            whole.append(leaf)
        else:
            raise ValueError(
                f"{name} needs every matrix to enter the step as one product with a vector; params at '{path}' "
                f"{list(view_p.shapes[leaf])} does not: it is used more than once, changed before its product, or used "
                f"in a loop. Write the layers of stack(cell, depth=L) out as stack(cell, cell, ...), take a cell "
                f"that keeps its matrices apart (nn.LSTMCell, not nn.OptimizedLSTMCell), or use uoro, which takes any."
            )
    return Structure(program, products, whole, *views)


def _product(leaf: int, variable: Variable, program: Program) -> Product | None:
    readers = [equation for equation in program.equations if variable in equation.inputs]
    if len(readers) != 1 or readers[0].name != "dot_general" or variable in program.outputs:
        return None
    equation = readers[0]
    side = 0 if equation.inputs[0] is variable else 1
    own, other = dot_axes(equation)[side], dot_axes(equation)[1 - side]
    is_product = len(own.contract) == len(own.free) == 1 and not own.batch and not other.free
    is_product = is_product and equation.inputs[1 - side] is not variable
    return Product(leaf, equation, side, own.contract[0]) if is_product else None


def factors_of(structure: Structure, params: PyTree, carry_tm1: PyTree, x: PyTree) -> Factors:
    """The factors of a step of one example."""
    program, dtype = structure.program, number_type(params, carry_tm1)
    p, h, u = structure.params.split(params), structure.carry.split(carry_tm1), structure.x.split(x)
    by_equation = {id(product.equation): i for i, product in enumerate(structure.products)}
    z_atoms = [product.equation.inputs[1 - product.side] for product in structure.products]

    def step(h_tm1: list[jax.Array], added: list[jax.Array], whole: list[jax.Array]) -> tuple[jax.Array, list]:
        """h_t, where ``added`` is added to the products, and their z."""
        weights = list(p.real)
        for leaf, value in zip(structure.whole, whole, strict=True):
            weights[leaf] = value

        def rule(equation: Equation, *values: jax.Array) -> list[jax.Array]:
            found = bind(equation, *values)
            i = by_equation.get(id(equation))
            return found if i is None else [found[0] + added[i]]

        given = jax.tree.leaves((weights, p.other, h_tm1, h.other, u.real, u.other))
        known = program.constants | dict(zip(program.inputs, given, strict=True))
        found = evaluate(program.equations, known, [*program.outputs, *z_atoms], rule)
        count = len(program.outputs)
        return vector(found[:count], dtype), [vector([z], dtype) for z in found[count:]]

    zeros = [jnp.zeros(product.outputs, product.equation.outputs[0].aval.dtype) for product in structure.products]
    at = h.real, zeros, [p.real[leaf] for leaf in structure.whole]
    (by_h, B, by_whole), z = jax.jacrev(step, argnums=(0, 1, 2), has_aux=True)(*at)
    n = structure.carry.size
    return Factors(_columns(by_h, n, dtype), z, [part.astype(dtype) for part in B], _columns(by_whole, n, dtype))


def _columns(parts: list[jax.Array], n: int, dtype: np.dtype) -> jax.Array:
    flat = [part.reshape(n, int(np.prod(part.shape[1:], dtype=int))).astype(dtype) for part in parts]
    return jnp.concatenate([jnp.zeros((n, 0), dtype), *flat], axis=1)


def gradient_of(structure: Structure, products: list[jax.Array], whole: jax.Array, dtype: np.dtype) -> jax.Array:
    """A gradient by every number of params, from those of the products, shaped as their weights, and of the rest."""
    found = [jnp.zeros(shape, dtype) for shape in structure.params.shapes]
    for product, gradient in zip(structure.products, products, strict=True):
        found[product.leaf] = gradient
    start = 0
    for leaf in structure.whole:
        size = structure.params.sizes[leaf]
        found[leaf] = whole[start : start + size]
        start += size
    return vector(found, dtype)
