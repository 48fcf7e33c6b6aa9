"""A node's step and its VJP as one flat program, split by what each value depends on.

    (params, carry_tm1, input, carry_bar_t) -> carry_t, params_bar, carry_bar_tm1, input_bar

Parameters alone: computed once. The step: computed for all steps of a segment at once where it does not depend on the
carry, else in the loop over steps. The cotangent: linear; where a value depends on one unit's cotangent alone, it is
that cotangent times a coefficient, which is found without running the program on cotangents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepeprop_jax.analysis import labels
from deepeprop_jax.analysis.cell_parts import Cut, Others, Reals, Views
from deepeprop_jax.analysis.outer_products import Cuts, find_cuts
from deepeprop_jax.analysis.units import Units, unit_numbers
from deepeprop_jax.jaxpr.batched import Lifted, Values
from deepeprop_jax.jaxpr.gates import unconcatenate
from deepeprop_jax.jaxpr.primitives import STORED
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    dependents,
    evaluate,
    is_variable,
    trace,
)
from deepeprop_jax.jaxpr.real_leaves import Parts


class Pull(NamedTuple):
    """How some linear values follow from the cotangent of the carry.

    Attributes:
      outputs: what is wanted.
      frontier: variables that depend on one unit each, from which the rest follows.
      equations: the rest.
    """

    outputs: list[Atom]
    frontier: list[Variable]
    equations: list[Equation]


class VjpProgram(NamedTuple):
    """The program of a node, split.

    Attributes:
      program: all of it.
      params, carry_tm1, input: input variables of the real leaves; ``*_other`` those of the other leaves.
      cotangents: input variables, the cotangent of each real leaf of the new carry.
      carry_t, carry_t_other: outputs.
      step: variables that depend on the step, not on the cotangent.
      linear: variables that depend on the cotangent.
      before_loop: variables of the step that the loop reads and that do not depend on the carry.
      loop: equations of the new carry that depend on the old one.
      stored: variables that the loop hands out for the backward pass.
      unit: per linear variable whose elements depend on one unit each, that unit (0 where on none).
      first_unit: per carry leaf, the number of its first unit.
      cuts: the parameters' cotangents.
      to_params, to_carry, to_input: pulls of the deltas of ``cuts``, of carry_bar_tm1 and of input_bar.
      labels: of all linear values.
      localised: equations and evaluation rule of carry_bar_tm1 cut to unit-local blocks; ``labels`` itself where
        nothing has to be cut, None without a certificate.
      mixing: what mixes units, in words, where there is none.
      transposed: weights that ``to_carry`` reads transposed: the new variable, and what it is the transpose of.
    """

    program: Program
    params: list[Variable]
    carry_tm1: list[Variable]
    input: list[Variable]
    params_other: list[Variable]
    carry_other: list[Variable]
    input_other: list[Variable]
    cotangents: list[Variable]
    carry_t: list[Atom]
    carry_t_other: list[Atom]
    step: set[Variable]
    linear: set[Variable]
    before_loop: list[Variable]
    loop: list[Equation]
    stored: list[Variable]
    unit: dict[Variable, np.ndarray]
    first_unit: list[int]
    cuts: Cuts
    to_params: Pull
    to_carry: Pull
    to_input: Pull
    labels: labels.Labelling
    localised: labels.Labelling | None
    mixing: str
    transposed: dict[Variable, Variable]


def vjp_program(cut: Cut, cell: Views, units: Units) -> VjpProgram:
    """Trace and split a cell's step and VJP."""
    views = (cell.params, cell.carry, cell.input)
    reals = [view.real_avals for view in views]
    others = tuple(view.other_avals for view in views)
    primal = unconcatenate(trace(cut.next_carry_parts, *reals, others, reals[1]))

    def step(p: Reals, h: Reals, u: Reals, others: Others, ct: Reals):
        point = h

        def next_carry(p: Reals, h: Reals, u: Reals):
            leaves = zip(primal.inputs, jax.tree.leaves((p, h, u, others, point)), strict=True)
            outputs = evaluate(primal.equations, {**primal.constants, **dict(leaves)}, primal.outputs)
            return outputs[: len(h)], outputs[len(h) :]

        h_t, vjp, other = jax.vjp(next_carry, p, h, u, has_aux=True)
        return h_t, other, *vjp(ct)

    program = trace(step, *reals, others, reals[1])
    counts = [len(view.shapes) for view in views] + [len(view.other_avals) for view in views]
    groups = _cut_list(program.inputs, counts)
    params, carry, inputs, params_other, carry_other, input_other, cotangents = groups
    outputs = _cut_list(program.outputs, [counts[1], counts[4], counts[0], counts[1]])
    carry_t, carry_t_other, params_bar, carry_bar, input_bar = outputs

    linear = dependents(program.equations, cotangents)
    step_variables = dependents(program.equations, [*carry, *inputs, *carry_other, *input_other]) - linear
    on_carry = dependents(program.equations, [*carry, *carry_other])
    linear_equations = [e for e in program.equations if e.outputs[0] in linear]
    cuts = find_cuts(program.equations, params_bar, linear, step_variables)

    ids = unit_numbers(units, cell.carry)
    seeds = {variable: labels.Labels.of(unit) for variable, unit in zip(cotangents, ids, strict=True)}
    exact = labels.depends_on(linear_equations, seeds)
    unit = {v: label.unit for v, label in exact.labels.items() if label.pure}

    def pull_of(outputs: Sequence[Atom]) -> Pull:
        needed = [atom for atom in outputs if is_variable(atom) and atom in linear]
        rest = backward_slice(linear_equations, needed, unit)
        read = [atom for e in rest for atom in e.inputs if is_variable(atom)] + needed
        return Pull(list(outputs), [v for v in dict.fromkeys(read) if v in unit], rest)

    to_params, to_carry, to_input = (pull_of(atoms) for atoms in (cuts.linear(), carry_bar, input_bar))
    loop = [
        e
        for e in backward_slice(program.equations, [*carry_t, *carry_t_other])
        if any(o in on_carry for o in e.outputs)
    ]
    inside = {output for e in loop for output in e.outputs}
    read = [a for e in loop for a in e.inputs] + carry_t + carry_t_other
    before = dict.fromkeys(a for a in read if is_variable(a) and a in step_variables and a not in inside)
    before_loop = [v for v in before if v not in set(carry) | set(carry_other)]
    stored = _stored(program, loop, linear_equations, cuts, step_variables)
    to_carry, transposed = _transpose_weights(to_carry, linear | step_variables)
    localised, mixing = _localised(exact, linear_equations, carry_bar, ids, seeds)
    first_unit = [int(unit.min(initial=cell.carry.size)) for unit in ids]
    return VjpProgram(
        program, params, carry, inputs, params_other, carry_other, input_other, cotangents, carry_t,
        carry_t_other, step_variables, linear, before_loop, loop, stored, unit, first_unit, cuts,
        to_params, to_carry, to_input, exact, localised, mixing, transposed,
    )  # fmt: skip


def _localised(
    exact: labels.Labelling,
    equations: list[Equation],
    carry_bar: list[Atom],
    ids: list[np.ndarray],
    seeds: dict[Variable, labels.Labels],
) -> tuple[labels.Labelling | None, str]:
    """See ``VjpProgram.localised`` and ``mixing``."""
    if labels.within_units(exact, carry_bar, ids):
        return exact, ""
    cut = labels.cut_to_units(backward_slice(equations, carry_bar), carry_bar, ids, seeds)
    if labels.within_units(cut, carry_bar, ids):
        return cut, ""
    # A label may also be pure and yet of another unit, as in a reversal: then nothing mixed it.
    blamed = [cut.culprits[atom] for atom in carry_bar if is_variable(atom) and atom in cut.culprits]
    return None, blamed[0] if blamed else "units exchange places"


def _cut_list(items: list, counts: list[int]) -> list[list]:
    """Consecutive parts of the given lengths, and what is left."""
    ends = [0, *np.cumsum(counts), len(items)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def _transpose_weights(pull: Pull, varying: set[Variable]) -> tuple[Pull, dict[Variable, Variable]]:
    """A loop that multiplies by a weight's transpose is slow on a CPU: read it transposed once, before the loop."""
    transposed: dict[Variable, Variable] = {}
    of: dict[Variable, Variable] = {}
    equations = []
    for e in pull.equations:
        weight = e.inputs[-1]
        by_transpose = e.name == "dot_general" and e.params["dimension_numbers"] == (((0,), (1,)), ((), ()))
        if by_transpose and is_variable(weight) and weight not in varying and len(weight.aval.shape) == 2:
            if weight not in of:
                of[weight] = Variable(jax.ShapeDtypeStruct(weight.aval.shape[::-1], weight.aval.dtype))
                transposed[of[weight]] = weight
            params = {**e.params, "dimension_numbers": (((0,), (0,)), ((), ()))}
            e = Equation(e.primitive, params, [e.inputs[0], of[weight]], e.outputs)
        equations.append(e)
    return pull._replace(equations=equations), transposed


def _stored(
    program: Program, loop: list[Equation], linear: list[Equation], cuts: Cuts, step: set[Variable]
) -> list[Variable]:
    """Costly results of the loop that the backward pass needs, directly or to recompute what is cheap."""
    costly = {output for e in loop if e.name in STORED for output in e.outputs}
    wanted = {a for e in linear for a in e.inputs if is_variable(a) and a in step}
    wanted |= {a for p in cuts.products if p is not None for a in p.equation.inputs if is_variable(a) and a in step}
    used = {a for e in backward_slice(program.equations, wanted, costly) for a in e.inputs if is_variable(a)} | wanted
    return [output for e in loop for output in e.outputs if output in costly and output in used]


def parameter_values(program: VjpProgram, params: Parts) -> Values:
    """Everything that depends on the parameters alone, once per sequence."""
    pairs = [*zip(program.params, params.real, strict=True), *zip(program.params_other, params.other, strict=True)]
    known = {variable: Lifted(value) for variable, value in program.program.constants.items()}
    known |= {variable: Lifted(value) for variable, value in pairs}
    values = Values(program.program.equations, known)
    read = [a for e in program.program.equations for a in e.inputs]
    read += [*program.transposed.values(), *program.carry_t, *program.carry_t_other]
    varying = program.step | program.linear
    values.get(dict.fromkeys(a for a in read if is_variable(a) and a not in varying | set(program.transposed)))
    for transposed, weight in program.transposed.items():
        values.known[transposed] = Lifted(values.read(weight).value.T)
    return values
