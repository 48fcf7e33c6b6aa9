"""Several programs that do the same at other places of their arrays, as one program that is told which of them to be.

Traced for each device with what is known of it, such programs differ in where they slice and pad, and in constants.
Those become values looked up by the device's number; all else is the same, and stands once. So all devices run one
program, as they must, which is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.jaxpr.batched import bind
from deepeprop_jax.jaxpr.primitives import CUSTOM_RULES
from deepeprop_jax.jaxpr.program import Atom, Equation, Literal, Program, Variable, is_variable, shape_of
from deepeprop_jax.jaxpr.trace import inner_programs, inside


class NotAlike(ValueError):
    """Programs that differ in more than in places and constants."""


def merged(programs: Sequence[Program]) -> Callable[[jax.Array, Sequence[jax.Array]], list[jax.Array]]:
    """``run(number, inputs)``: the outputs of the program with this number.

    Raises:
      NotAlike: programs that differ in more.
    """
    _Alike(programs).check()
    return lambda number, inputs: _Alike(programs, number).run(inputs)


class _Alike:
    """Programs that go step by step beside each other; values are those of the variables of the first.

    Args:
      number: which of them is run; None where they are only looked at.
    """

    def __init__(self, programs: Sequence[Program], number: jax.Array | None = None):
        self._programs, self._number = programs, number
        self._first: dict[Variable, Variable] = {}  # of every other program's variable, that of the first
        self._varying = False
        counts = {(len(p.equations), len(p.inputs), len(p.outputs)) for p in programs}
        if len(counts) > 1 or len({len(program.constants) for program in programs}) > 1:
            raise NotAlike(f"programs of {sorted(counts)} equations, inputs and outputs")
        self._match(program.inputs for program in programs)
        self._match(program.constants for program in programs)

    def check(self) -> bool:
        """Whether they differ at all, in what may differ."""
        for values in zip(*(program.constants.values() for program in self._programs), strict=True):
            self._varying |= not all(_same(values[0], value) for value in values)
        for equations in zip(*(program.equations for program in self._programs), strict=True):
            self._operands(equations)
            self._check_equation(equations)
            self._match(equation.outputs for equation in equations)
        self._operands([_Outputs(program.outputs) for program in self._programs])
        return self._varying

    def run(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """The outputs of the program that is run."""
        first = self._programs[0]
        known = dict(zip(first.inputs, inputs, strict=True))
        constants = zip(*(program.constants.values() for program in self._programs), strict=True)
        known |= {name: self._looked_up(values) for name, values in zip(first.constants, constants, strict=True)}
        for equations in zip(*(program.equations for program in self._programs), strict=True):
            values = [known[x] if isinstance(x, Variable) else x for x in self._operands(equations)]
            known.update(zip(equations[0].outputs, self._apply(equations, values), strict=True))
            self._match(equation.outputs for equation in equations)
        outputs = self._operands([_Outputs(program.outputs) for program in self._programs])
        return [known[x] if isinstance(x, Variable) else x for x in outputs]

    def _match(self, groups) -> None:
        first, *others = map(list, groups)
        for other in others:
            if [(v.aval.shape, v.aval.dtype) for v in first] != [(v.aval.shape, v.aval.dtype) for v in other]:
                raise NotAlike(f"shapes {[v.aval.shape for v in first]} and {[v.aval.shape for v in other]}")
            self._first.update(zip(other, first, strict=True))

    def _operands(self, equations: Sequence[Equation]) -> list[Variable | jax.Array]:
        """Per input the variable of the first program, which has to be the same one in all, or a number."""
        found: list[Variable | jax.Array] = []
        for atoms in zip(*(equation.inputs for equation in equations), strict=True):
            if all(isinstance(atom, Literal) for atom in atoms):
                values = [atom.val for atom in atoms]
                self._varying |= not all(_same(values[0], value) for value in values)
                found.append(values[0] if self._number is None else self._looked_up(values))
            elif all(map(is_variable, atoms)) and {self._first.get(a, a) for a in atoms[1:]} <= {atoms[0]}:
                found.append(atoms[0])
            else:
                raise NotAlike(f"the operands of {equations[0].primitive} come from different places")
        return found

    def _looked_up(self, values: Sequence) -> jax.Array:
        """The value of the program that is run."""
        if all(_same(values[0], value) for value in values):
            return values[0]
        dtype = jnp.result_type(values[0])
        table = jnp.asarray(np.stack([np.asarray(value) for value in values]), dtype)
        return lax.dynamic_index_in_dim(table, self._number, keepdims=False)

    def _check_equation(self, equations: Sequence[Equation]) -> None:
        first = equations[0]
        if len({equation.primitive for equation in equations}) > 1:
            raise NotAlike(f"{sorted({equation.name for equation in equations})} at the same place")
        differing: set[str] = set().union(*(first.differing(equation) for equation in equations[1:]))
        if first.name in CUSTOM_RULES:
            differing = set()  # a rule is its function's, whose program is compared
        if differing - {"slice": {"start_indices", "limit_indices"}, "pad": {"padding_config"}}.get(first.name, set()):
            raise NotAlike(f"{first.primitive} differs in {sorted(differing)}")
        self._varying |= bool(differing)
        inner = [_Alike(bodies).check() for bodies in _bodies(equations)]
        if any(inner) and first.name not in ("scan", "cond"):
            raise NotAlike(f"a {first.primitive} that differs inside")
        self._varying |= any(inner)

    def _apply(self, equations: Sequence[Equation], values: Sequence[jax.Array]) -> list[jax.Array]:
        first, number = equations[0], self._number
        if first.name == "slice" and _differ([equation.slices for equation in equations]):
            starts = [[part.start for part in equation.slices] for equation in equations]
            return [self._sliced(values[0], starts, shape_of(first.outputs[0]))]
        if first.name == "pad" and _differ([equation.padding for equation in equations]):
            return [self._padded(values[0], values[1], equations)]
        bodies = _bodies(equations)
        if not any(_Alike(programs).check() for programs in bodies):
            return bind(first, *values)
        inner = [merged(programs) for programs in bodies]
        if first.name == "cond":
            branches = [lambda *args, run=run: run(number, args) for run in inner]
            return lax.switch(values[0], branches, *values[1:])
        return self._looped(first, inner[0], values)

    def _looped(self, loop: Equation, body: Callable, values: Sequence[jax.Array]) -> list[jax.Array]:
        """A scan whose body is merged."""
        part = inside(loop)
        assert part is not None
        fixed, carried = part.fixed, len(part.carried)
        (length, reverse), number = loop.turns, self._number

        def turn(carry: list[jax.Array], xs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            found = body(number, [*values[:fixed], *carry, *xs])
            return found[:carried], found[carried:]

        start, xs = list(values[fixed : fixed + carried]), list(values[fixed + carried :])
        end, stacked = lax.scan(turn, start, xs, length, reverse)
        return [*end, *stacked]

    def _sliced(self, value: jax.Array, starts: Sequence[Sequence[int]], sizes: Sequence[int]) -> jax.Array:
        begin = self._looked_up([np.asarray(start, np.int32) for start in starts])
        return lax.dynamic_slice(value, list(begin), sizes, allow_negative_indices=False)

    def _padded(self, value: jax.Array, filler: jax.Array, equations: Sequence[Equation]) -> jax.Array:
        """As much in front and behind as any of them has, and of that the part that is wanted."""
        paddings = np.asarray([equation.padding for equation in equations])  # (programs, axes, 3)
        most = np.maximum(paddings.max(axis=0), 0)
        wide = lax.pad(value, filler, [(int(low), int(high), int(between)) for low, high, between in most])
        starts = most[None, :, 0] - paddings[:, :, 0]
        return self._sliced(wide, starts, shape_of(equations[0].outputs[0]))


class _Outputs:
    """The outputs of a program, seen as what is read last."""

    primitive = "outputs"

    def __init__(self, atoms: Sequence[Atom]):
        self.inputs = atoms


def _bodies(equations: Sequence[Equation]) -> list[list[Program]]:
    """Per program inside the equations, what it is in each."""
    return [list(bodies) for bodies in zip(*map(inner_programs, equations), strict=True)]


def _differ(values: Sequence) -> bool:
    return any(value != values[0] for value in values[1:])


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if any(isinstance(x, jax.core.Tracer) for x in (a, b)):
        raise NotAlike("values of an outer trace that are not the same")
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b))
