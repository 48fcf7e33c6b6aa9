"""Nodes that only filter what enters them, and outputs that show each unit by itself.

    h_t = κ ∘ h_{t-1} + what enters,  linear in it, by weights that do not change from step to step

Such a node (a leaky readout, a low-pass filter, a linear memory) owes to parameters below what they did to its input,
filtered by κ. See ``segments/filtered.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.labels import Labels, depends_on
from deepeprop_jax.analysis.node import Node
from deepeprop_jax.analysis.units import to_grid
from deepeprop_jax.jaxpr.batched import Lifted, bind, evaluate, pull
from deepeprop_jax.jaxpr.program import Atom, Equation, backward_slice, dependents, read_by, variables
from deepeprop_jax.jaxpr.real_leaves import Parts
from deepeprop_jax.jaxpr.trace import trace


def decays(node: Node) -> np.ndarray | None:
    """κ, (n,): what a unit's carry is multiplied by at every step; None unless it is a constant for all units, and what
    enters comes in by weights that depend on parameters alone."""
    program = node.program
    if not node.elementwise or not node.recurrent or node.units.slots > 1:
        return None
    equations = program.program.equations
    linear = [e for e in equations if e.outputs[0] in program.linear]
    to_carry = backward_slice(linear, variables(program.to_carry.outputs))
    if not dependents(equations, program.program.inputs).isdisjoint(set(read_by(to_carry)) - program.linear):
        return None  # it depends on parameters, or on the step
    inputs = backward_slice(linear, variables(program.to_input.outputs))
    moving = [*program.carry_tm1, *program.carry_other, *program.input, *program.input_other]
    if not (dependents(equations, moving) - program.linear).isdisjoint(read_by(inputs)):
        return None
    constants = program.program.constants
    if any(isinstance(value, jax.core.Tracer) for value in constants.values()):
        return None  # numbers of another program, which are not known yet

    def read(atom: Atom) -> Lifted:
        return Lifted(evaluate(backward_slice(equations, [atom]), constants, [atom], _anywhere)[0])

    with jax.ensure_compile_time_eval():
        ones = [Lifted(jnp.ones(aval.shape, aval.dtype)) for aval in node.carry.real_avals]
        seeds = dict(zip(program.cotangents, ones, strict=True))
        found = pull(to_carry, seeds, program.linear, read, program.to_carry.outputs, _anywhere)
        flat = [
            np.zeros(shape) if x is None else np.broadcast_to(np.asarray(x.value), shape)
            for x, shape in zip(found, node.carry.shapes, strict=True)
        ]
    return np.concatenate([leaf.ravel() for leaf in flat]).astype(np.float64)


def _anywhere(equation: Equation, *values: jax.Array) -> list[jax.Array]:
    """As ``bind``, outside of the mesh that the program was traced for."""
    return list(values) if equation.name == "pvary" else bind(equation, *values)


def shown(node: Node) -> np.ndarray | None:
    """(units,) the number of the output that shows a unit, -1 where none does; None unless each is in one at most, as a
    function of that unit's new carry alone."""
    if node.cut.output_uses & {"params", "carry_tm1"} or not node.recurrent:
        return None
    by_leaf = _outputs_of(node, of_params=False)
    if any(numbers is None for numbers in by_leaf):
        return None
    flat = np.concatenate([numbers.ravel() for numbers in by_leaf if numbers is not None])
    by_slot = np.asarray(to_grid(flat + 1, node.units)) - 1  # (slots, units), nothing as -1
    outputs = by_slot.max(axis=0)
    return outputs if ((by_slot == outputs) | (by_slot < 0)).all() else None


def written(node: Node) -> list[np.ndarray | None]:
    """Of a node without a carry, per real parameter leaf and in its shape: the number of the output that an entry
    reaches, -1 for none; None for a leaf with an entry that reaches several."""
    return _outputs_of(node, of_params=True)


def _outputs_of(node: Node, of_params: bool) -> list[np.ndarray | None]:
    """The numbers of the outputs that parameters, or components of the new carry, have a part in."""
    others = (node.params.other_avals, node.carry.other_avals, node.input.other_avals)
    reals = [view.real_avals for view in (node.params, node.carry, node.input)]

    def back(params, carry, x, others, point, ct):
        def output(params: list[jax.Array], h: list[jax.Array]) -> list[jax.Array]:
            found: Parts = node.cut.output(params, h, carry, x, others, others[1], (point, point))
            return found.real

        return jax.vjp(output, params, carry)[1](ct)[0 if of_params else 1]

    program = trace(back, *reals, others, reals[1], node.output.real_avals)
    cotangents = program.inputs[len(program.inputs) - len(node.output.real_avals) :]
    numbers = np.split(np.arange(node.output.size), np.cumsum(node.output.sizes)[:-1])
    labels = [Labels.of(part.reshape(shape)) for part, shape in zip(numbers, node.output.shapes, strict=True)]
    linear = dependents(program.equations, cotangents)
    equations = [e for e in program.equations if e.outputs[0] in linear]
    labelling = depends_on(equations, dict(zip(cotangents, labels, strict=True)))
    found: list[np.ndarray | None] = []
    for atom, shape in zip(program.outputs, (node.params if of_params else node.carry).shapes, strict=True):
        label = labelling.of(atom)
        if label is None:
            found.append(np.full(shape, -1))
        elif not label.pure:
            found.append(None)
        else:
            unit, empty = (np.broadcast_to(x, shape) for x in (label.unit, label.empty))
            found.append(np.where(empty, -1, unit))
    return found
