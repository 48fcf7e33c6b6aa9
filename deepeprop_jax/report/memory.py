"""How many bytes a program takes at once, as XLA for CPU would run it, from its shapes alone.

XLA takes out of a loop what is the same at every turn, fuses an element-wise result into all that reads it, runs what
is ready breadth first, keeps a loop's values in one buffer from turn to turn, and copies an operand of a batched
product whose axes do not stand in its order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from deepeprop_jax.jaxpr.primitives import FUSED, FUSED_ONCE, VIEWS
from deepeprop_jax.jaxpr.program import (
    Atom,
    Equation,
    Program,
    Variable,
    backward_slice,
    dot_axes,
    is_variable,
    shape_of,
)
from deepeprop_jax.jaxpr.trace import inside

_NOT_ALONE = VIEWS | {"broadcast_in_dim", "iota", "rev", "slice", "transpose"}
"""Left in a loop, unless for something that is taken out of it."""

_IN_PLACE = FUSED | FUSED_ONCE | {"dynamic_update_slice"}
_READ_FUSED = _IN_PLACE | {"in order", "scatter-add"}


class _InOrder:
    """The primitive of a copy that puts a product's operand in order."""

    name = "in order"


def peak_bytes(program: Program) -> int:
    """Bytes of what the program computes that are alive at once, its outputs among them; its inputs are not counted."""
    return _Run(_expanded(program), ()).peak()


def _expanded(program: Program) -> Program:
    """What is needed, with ``params["inside"]`` at every loop and conditional; what is fixed in a loop is before it."""
    equations: list[Equation] = []
    constants = dict(program.constants)
    for equation in backward_slice(program.equations, program.outputs):
        part, inputs = inside(equation), list(equation.inputs)
        if part is not None:
            programs = [_expanded(body) for body in part.programs]
            if part.fixed:
                programs[0], moved, read = _without_fixed(programs[0], inputs[: part.fixed])
                equations += moved
                inputs += read
                constants |= programs[0].constants
            params = {"inside": part._replace(programs=programs)}
            equation = Equation(equation.primitive, params, inputs, equation.outputs)
        equations.append(equation)
    return program._replace(equations=equations, constants=constants)


def _without_fixed(body: Program, outside: Sequence[Atom]) -> tuple[Program, list[Equation], list[Variable]]:
    """The body of a loop without what is the same at every turn; that, over the atoms ``outside`` that the body's first
    inputs are; and what of it the body reads, as its last inputs."""
    atoms = dict(zip(body.inputs, outside, strict=False))
    fixed = {*atoms, *body.constants}
    outside_too = []
    for equation in body.equations:
        if all(atom in fixed for atom in equation.inputs if is_variable(atom)):
            fixed.update(equation.outputs)
            outside_too.append(equation)
    moved, kept = set(outside_too), []
    read = {atom for atom in body.outputs if is_variable(atom)}
    for equation in reversed(body.equations):
        if equation not in moved or (equation.name in _NOT_ALONE and read.intersection(equation.outputs)):
            moved.discard(equation)
            kept.append(equation)
            read.update(atom for atom in equation.inputs if is_variable(atom))
    handed = [output for equation in outside_too if equation in moved for output in equation.outputs if output in read]
    now_outside = [
        Equation(e.primitive, e.params, [atoms.get(a, a) if is_variable(a) else a for a in e.inputs], e.outputs)
        for e in outside_too
    ]
    return body._replace(equations=kept[::-1], inputs=[*body.inputs, *handed]), now_outside, handed


class _Run:
    """One program: what is stored, in which order, and until when.

    Args:
      carried: (input, output) that share a buffer, in the body of a loop.
    """

    def __init__(self, program: Program, carried: Iterable[tuple[int, int]]):
        needed = _with_operands_in_order(backward_slice(program.equations, program.outputs))
        self._outputs = {atom for atom in program.outputs if is_variable(atom)}
        self._maker = {output: equation for equation in needed for output in equation.outputs}
        self._readers: dict[Variable, list[Equation]] = defaultdict(list)
        for equation in needed:
            for atom in filter(is_variable, equation.inputs):
                self._readers[atom].append(equation)
        self._stored_in: dict[Variable, frozenset[Variable]] = {}
        fused = {v for v, equation in self._maker.items() if self._is_fused(v, equation)}
        for variable in (*program.inputs, *program.constants):
            self._stored_in[variable] = frozenset([variable])
        for equation in needed:
            behind = self._behind(equation.inputs)
            for output in equation.outputs:
                self._stored_in[output] = behind if output in fused else frozenset([output])
        steps = [equation for equation in needed if any(output not in fused for output in equation.outputs)]
        self._steps = self._breadth_first(steps, [*program.inputs, *program.constants])
        self._last: dict[Variable, int] = {}
        for i, equation in enumerate(self._steps):
            self._last |= dict.fromkeys(self._behind(equation.inputs), i)
        self._last |= dict.fromkeys(self._behind(program.outputs), len(self._steps))
        self._in_place = self._written_over(program, carried)

    def _is_fused(self, variable: Variable, equation: Equation) -> bool:
        if equation.name in VIEWS:
            return True
        if variable in self._outputs or equation.name not in FUSED | FUSED_ONCE or equation.name == "transpose":
            return False
        readers = self._readers[variable]
        return all(_reads_fused(e) for e in readers) and (equation.name in FUSED or len(readers) < 2)

    def _behind(self, atoms: Iterable[Atom]) -> frozenset[Variable]:
        """The stored values that are read where ``atoms`` are."""
        return frozenset().union(*(self._stored_in[atom] for atom in atoms if is_variable(atom)))

    def _breadth_first(self, steps: list[Equation], inputs: list[Variable]) -> list[Equation]:
        reads = [self._behind(equation.inputs) for equation in steps]
        readers: dict[Variable, list[int]] = defaultdict(list)
        for i, read in enumerate(reads):
            for variable in read:
                readers[variable].append(i)
        missing = [len(read) for read in reads]
        ready: deque[tuple[list[Equation], list[Variable]]] = deque(([], [variable]) for variable in inputs)
        ready.extend(([step], step.outputs) for step, count in zip(steps, missing, strict=True) if not count)
        order: list[Equation] = []
        while ready:
            run, made = ready.popleft()
            order += run
            for i in (i for variable in made for i in readers[variable]):
                missing[i] -= 1
                if not missing[i]:
                    ready.append(([steps[i]], steps[i].outputs))
        return order

    def _written_over(self, program: Program, carried: Iterable[tuple[int, int]]) -> set[Variable]:
        """New values of a loop that can take the place of the old ones, which nothing reads any more."""
        made = {output: i for i, equation in enumerate(self._steps) for output in equation.outputs}
        found = set()
        for i, o in carried:
            for new in self._behind(program.outputs[o : o + 1]):
                old = self._last.get(program.inputs[i], -1)
                same = new in made and _bytes(new) == _bytes(program.inputs[i])
                if same and (old < made[new] or (old == made[new] and _in_place(self._maker[new]))):
                    found.add(new)
        return found

    def peak(self) -> int:
        """See ``peak_bytes``."""
        alive: dict[Variable, int] = {}
        now = most = 0
        for i, equation in enumerate(self._steps):
            dying = [v for v in self._behind(equation.inputs) if self._last[v] == i and v in alive]
            most = max(most, now + self._inside(equation, i, alive))
            for output in equation.outputs:
                if output in self._in_place or self._stored_in[output] != frozenset([output]):
                    continue
                size = _bytes(output)
                taken = next((v for v in dying if alive[v] == size), None) if _in_place(equation, loops=False) else None
                if taken is None:
                    now += size
                else:
                    alive[taken] = 0
                alive[output] = size
            most = max(most, now)
            for variable in (*dying, *equation.outputs):
                if variable in alive and self._last.get(variable, -1) <= i:
                    now -= alive.pop(variable)
        return most

    def _inside(self, equation: Equation, i: int, alive: dict[Variable, int]) -> int:
        """What a loop or a conditional takes, beside what is alive before it."""
        part = equation.params.get("inside")
        if part is None:
            return 0
        most = max(_Run(program, part.carried).peak() for program in part.programs)
        results = sum(_bytes(output) for output in equation.outputs if output not in self._in_place)
        if not part.start:  # a branch's outputs are those of the conditional
            return most + results - sum(_bytes(output) for output in equation.outputs)
        handed = [self._behind([equation.inputs[place]]) for place in part.start]
        taken = {v for values in handed for v in values if v in alive and self._last[v] == i}
        return most + results - sum(alive[v] for v in taken)


def _reads_fused(equation: Equation) -> bool:
    return equation.name in _READ_FUSED or equation.name.startswith("reduce")


def _in_place(equation: Equation, loops: bool = True) -> bool:
    """Whether a result can take the place of an operand that nothing reads afterwards."""
    name = equation.name
    return name in _IN_PLACE or name.startswith("scatter") or (loops and name in ("scan", "while", "cond"))


def _with_operands_in_order(equations: list[Equation]) -> list[Equation]:
    """With the copies that a product needs: axes of the batch first, contracted and free ones each together."""
    found = []
    for equation in equations:
        if equation.name == "dot_general":
            operands = list(equation.inputs)
            for side, (batch, _, contract) in enumerate(dot_axes(equation)):
                operand = operands[side]
                if is_variable(operand) and not _in_order(shape_of(operand), batch, contract):
                    operands[side] = Variable(operand.aval)
                    found.append(Equation(_InOrder, {}, [operand], [operands[side]]))
            equation = Equation(equation.primitive, equation.params, operands, equation.outputs)
        found.append(equation)
    return found


def _in_order(shape: tuple[int, ...], batch: list[int], contract: list[int]) -> bool:
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    first, together = ([axis for axis in group if axis in axes] for group in (batch, contract))
    free = [axis for axis in axes if axis not in (*first, *together)]
    return axes in (first + free + together, first + together + free)


def _bytes(variable: Variable) -> int:
    aval = variable.aval
    if not hasattr(aval, "shape") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return 0
    return int(np.prod(aval.shape, dtype=int)) * np.dtype(aval.dtype).itemsize
