"""A node's step and its VJP as one flat program, split by what each value depends on.

    (params, carry_tm1, input, carry_bar_t) -> carry_t, params_bar, carry_bar_tm1, input_bar

Parameters alone: computed once. The step: computed for all steps of a segment at once where it does not depend on the
carry, else in the loop over steps. The cotangent: linear; where a value depends on one unit's cotangent alone, it is
that cotangent times a coefficient, which is found without running the program on cotangents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from deepeprop_jax.analysis.labels import Labelling, Labels, cut_to_units, depends_on
from deepeprop_jax.analysis.node import Cut, Cuts, Others, Product, Pull, Reals, VjpProgram
from deepeprop_jax.analysis.units import Units, unit_numbers
from deepeprop_jax.jaxpr.batched import evaluate
from deepeprop_jax.jaxpr.gates import crop_early, unconcatenate
from deepeprop_jax.jaxpr.primitives import STORED
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    dependents,
    dot_axes,
    is_in,
    is_variable,
    made_by,
    read_by,
    shape_of,
    transposed_weight,
    variables,
)
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.jaxpr.trace import trace

T = TypeVar("T")


class Found(NamedTuple):
    """The program, and what its labels say.

    Attributes:
      exact: the labels of all linear values.
      localised: those where every dot that mixes units is cut; ``exact`` where nothing has to be, None without a
        certificate that the carry's cotangents then stay in their units.
      mixing: what mixes units, in words, where there is none.
    """

    program: VjpProgram
    exact: Labelling
    localised: Labelling | None
    mixing: str


def vjp_program(cut: Cut, views: Sequence[RealView], units: Units) -> Found:
    """Trace and split a cell's step and VJP; ``views`` of its params, carry and input."""
    reals = [view.real_avals for view in views]
    others = tuple(view.other_avals for view in views)
    primal = unconcatenate(trace(cut.next_carry, *reals, others, reals[1]))

    def step(p: Reals, h: Reals, u: Reals, others: Others, ct: Reals):
        point = h

        def next_carry(p: Reals, h: Reals, u: Reals):
            leaves = zip(primal.inputs, jax.tree.leaves((p, h, u, others, point)), strict=True)
            outputs = evaluate(primal.equations, {**primal.constants, **dict(leaves)}, primal.outputs)
            return outputs[: len(h)], outputs[len(h) :]

        h_t, vjp, other = jax.vjp(next_carry, p, h, u, has_aux=True)
        return h_t, other, *vjp(ct)

    program = crop_early(trace(step, *reals, others, reals[1]))
    counts = [len(leaves) for leaves in (*reals, *others)]
    params, carry, inputs, params_other, carry_other, input_other, cotangents = _cut_list(program.inputs, counts)
    parts = _cut_list(program.outputs, [counts[1], counts[4], counts[0], counts[1]])
    carry_t, carry_t_other, params_bar, carry_bar, input_bar = parts

    linear = dependents(program.equations, cotangents)
    step_variables = dependents(program.equations, [*carry, *inputs, *carry_other, *input_other]) - linear
    linear_equations = [e for e in program.equations if e.outputs[0] in linear]
    cuts = _find_cuts(program.equations, params_bar, linear, step_variables)

    ids = unit_numbers(units, views[1])
    seeds = {variable: Labels.of(unit) for variable, unit in zip(cotangents, ids, strict=True)}
    exact = depends_on(linear_equations, seeds)
    unit = {v: label.unit for v, label in exact.labels.items() if label.pure}

    def pull_of(outputs: Sequence[Atom]) -> Pull:
        needed = [atom for atom in variables(outputs) if atom in linear]
        rest = backward_slice(linear_equations, needed, unit)
        return Pull(list(outputs), [v for v in dict.fromkeys([*read_by(rest), *needed]) if v in unit], rest)

    pairs = zip(cuts.variables, cuts.products, strict=True)
    to_params = pull_of([v if p is None else p.equation.inputs[p.side] for v, p in pairs])
    on_carry = dependents(program.equations, [*carry, *carry_other])
    whole = backward_slice(program.equations, [*carry_t, *carry_t_other])
    loop = [e for e in whole if not on_carry.isdisjoint(e.outputs)]
    read = dict.fromkeys([*read_by(loop), *variables(carry_t + carry_t_other)])
    inside = {*made_by(loop), *carry, *carry_other}
    before_loop = [v for v in read if v in step_variables and v not in inside]
    stored = _stored(program, loop, linear_equations, cuts, step_variables)
    to_carry, transposed = _transpose_weights(pull_of(carry_bar), linear | step_variables)
    localised, mixing = _localised(exact, linear_equations, carry_bar, ids, seeds)
    first_unit = [int(unit.min(initial=views[1].size)) for unit in ids]
    found = VjpProgram(
        program, params, carry, inputs, params_other, carry_other, input_other, cotangents, carry_t,
        carry_t_other, step_variables, linear, before_loop, loop, stored, unit, first_unit, cuts,
        to_params, to_carry, pull_of(input_bar), None if localised is None else localised.rule(), transposed,
    )  # fmt: skip
    return Found(found, exact, localised, mixing)


def _localised(
    exact: Labelling,
    equations: list[Equation],
    carry_bar: list[Atom],
    ids: list[np.ndarray],
    seeds: dict[Variable, Labels],
) -> tuple[Labelling | None, str]:
    """See ``Found.localised`` and ``mixing``."""
    if exact.within(carry_bar, ids):
        return exact, ""
    cut = cut_to_units(backward_slice(equations, carry_bar), carry_bar, ids, seeds)
    if cut.within(carry_bar, ids):
        return cut, ""
    # A label may also be pure and yet of another unit, as in a reversal: then nothing mixed it.
    blamed = [cut.culprits[atom] for atom in carry_bar if is_in(atom, cut.culprits)]
    return None, blamed[0] if blamed else "units exchange places"


def _cut_list(items: list[T], counts: list[int]) -> list[list[T]]:
    """Consecutive parts of the given lengths, and what is left."""
    ends = [0, *np.cumsum(counts), len(items)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def _transpose_weights(pull: Pull, varying: set[Variable]) -> tuple[Pull, dict[Variable, Variable]]:
    """A loop that multiplies by a weight's transpose is slow on a CPU: read it transposed once, before the loop."""
    of: dict[Variable, Variable] = {}
    equations = []
    for e in pull.equations:
        weight = e.inputs[-1]
        is_weight = e.name == "dot_general" and is_variable(weight) and weight not in varying
        if is_weight and dot_axes(e)[0].contract == [0] and dot_axes(e)[1] == ([], [0], [1]):
            if weight not in of:
                of[weight] = Variable(jax.ShapeDtypeStruct(weight.aval.shape[::-1], weight.aval.dtype))
            e = transposed_weight(e, of[weight])
        equations.append(e)
    return pull._replace(equations=equations), {transpose: weight for weight, transpose in of.items()}


def _stored(
    program: Program, loop: list[Equation], linear: list[Equation], cuts: Cuts, step: set[Variable]
) -> list[Variable]:
    """Costly results of the loop that the backward pass needs, directly or to recompute what is cheap."""
    costly = {*made_by(e for e in loop if e.name in STORED)}
    products = [p.equation for p in cuts.products if p is not None]
    wanted = {v for v in read_by([*linear, *products]) if v in step}
    used = {*read_by(backward_slice(program.equations, wanted, costly))} | wanted
    return [output for output in made_by(loop) if output in costly and output in used]


def _find_cuts(
    equations: Sequence[Equation], outputs: Sequence[Atom], linear: set[Variable], step: set[Variable]
) -> Cuts:
    """Cut the parameter part of a VJP, whose outputs are the cotangents of the parameters."""
    producer = {output: equation for equation in equations for output in equation.outputs}
    product: dict[Variable, bool] = {}

    def as_product(equation: Equation | None) -> Product | None:
        if equation is None or equation.name != "dot_general":
            return None
        sides = [side for side in (0, 1) if is_in(equation.inputs[side], linear)]
        is_product = len(sides) == 1 and is_in(equation.inputs[1 - sides[0]], step)
        return Product(equation, sides[0]) if is_product else None

    def above_product(atom: Atom) -> bool:
        """Whether a product lies upstream, with nothing that depends on the step in between."""
        if not is_in(atom, linear) or atom not in producer:
            return False
        if atom not in product:
            equation = producer[atom]
            between = not any(is_in(a, step) for a in equation.inputs)
            product[atom] = as_product(equation) is not None or (between and any(map(above_product, equation.inputs)))
        return product[atom]

    summed: dict[Variable, Product | None] = {}
    after: set[int] = set()

    def visit(atom: Atom) -> None:
        if not is_in(atom, linear) or atom in summed:
            return
        equation = producer.get(atom)
        found = as_product(equation)
        if equation is None or found is not None or not above_product(atom):
            summed[atom] = found
        elif id(equation) not in after:
            after.add(id(equation))
            for source in equation.inputs:
                visit(source)

    for atom in outputs:
        visit(atom)
    kept = [equation for equation in equations if id(equation) in after]
    for equation in kept:
        (source, *_), (output, *_) = equation.inputs, equation.outputs
        found = summed[source] if is_in(source, summed) else None
        readers = [e for e in kept if source in e.inputs] + [atom for atom in outputs if atom is source]
        if found is not None and equation.name == "transpose" and len(readers) == 1 and len(shape_of(source)) == 2:
            # Asked for in this order, the product needs no transpose of its operands.
            summed = {output if v is source else v: p for v, p in summed.items()}
            summed[output] = found._replace(swapped=not found.swapped)
    return Cuts(list(summed), list(summed.values()), kept, list(outputs))
