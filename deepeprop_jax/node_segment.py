"""One node over the C steps of a segment: forward, and the pull of a cotangent back through all of its steps.

Everything that is differentiated anywhere in a segment is one call of ``back``: of the loss's cotangents, of ones on a
slot of the last carry (the node's own local trace), of unit vectors on it (dense rows, influences across nodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax import labels as lb
from deepeprop_jax import outer
from deepeprop_jax.cut import Reals
from deepeprop_jax.jaxprs import Atom, backward_slice, bind, is_variable
from deepeprop_jax.lifted import Lifted, Rule, Values, add, broadcast, elementwise, pull, scan_back, union
from deepeprop_jax.node import from_grid
from deepeprop_jax.real import Parts
from deepeprop_jax.trace import spread
from deepeprop_jax.vjp_program import Pull, VjpProgram

Leaves = list[Lifted | None]
"""Cotangents of some real leaves; None is a zero."""


class Flags(NamedTuple):
    """(C, batch) booleans, None where all are false (resets) or true (valid)."""

    resets: jax.Array | None
    valid: jax.Array | None


class Back(NamedTuple):
    """What ``back`` finds.

    Attributes:
      start: cotangent of the carry at the segment's start; empty where the past is cut off.
      steps: cotangent of the new carry at every step.
      output: cotangent of the output at every step.
      input: cotangent of the input at every step.
    """

    start: Leaves
    steps: Leaves
    output: Leaves
    input: Leaves


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


class NodeSegment:
    """A node that has run through a segment.

    Attributes:
      carry_end: (batch, ...) its carry after the segment.
      outputs: (C, batch, ...) parts of its outputs.
    """

    def __init__(
        self,
        program: VjpProgram,
        params: Parts,
        values: Values,
        start: Parts,
        inputs: Parts,
        initial: Parts,
        flags: Flags,
    ):
        self.program, self.node, self.params, self.flags = program, program.node, params, flags
        self.sizes = {"c": inputs_length(inputs), "b": inputs_batch(inputs)}
        known = dict(values.known)
        known |= {v: Lifted(a, "cb") for v, a in zip(program.input, inputs.real, strict=True)}
        known |= {v: Lifted(a, "cb") for v, a in zip(program.input_other, inputs.other, strict=True)}
        self.values = Values(program.program.equations, known)
        self.input = inputs
        self._forward(start, initial)
        self._coefficients: dict[Any, dict[int, Lifted]] = {}
        self._blocks: dict[tuple[int, int], Lifted] | None = None

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, start: Parts, initial: Parts) -> None:
        program, flags = self.program, self.flags
        before = dict(zip(program.before_loop, self.values.get(program.before_loop), strict=True))
        moving = {v: x.value for v, x in before.items() if "c" in x.axes}
        fixed = {v: x for v, x in self.values.known.items() if "c" not in x.axes}

        def body(carry: Parts, slices: tuple[list[jax.Array], Flags]) -> tuple[Parts, Any]:
            arrays, now = slices
            if now.resets is not None:
                carry = Parts(*(_choose(now.resets, a, b) for a, b in zip(initial, carry, strict=True)))
            known = fixed | {v: Lifted(a, "b") for v, a in zip(moving, arrays, strict=True)}
            known |= {v: Lifted(a, "b") for v, a in zip(program.carry_tm1, carry.real, strict=True)}
            known |= {v: Lifted(a, "b") for v, a in zip(program.carry_other, carry.other, strict=True)}
            values = Values(program.loop, known)
            batch = {"b": self.sizes["b"]}
            new = Parts(
                [broadcast(x, "b", batch) for x in values.get(program.carry_t)],
                [broadcast(x, "b", batch) for x in values.get(program.carry_t_other)],
            )
            stored = [broadcast(x, "b", batch) for x in values.get(program.stored)]
            held = new
            if now.valid is not None:
                held = Parts(*(_choose(now.valid, a, b) for a, b in zip(new, carry, strict=True)))
            plain = now.resets is None and now.valid is None
            return held, (carry, stored, Parts([], new.other) if plain else new)

        self.carry_end, (carry_tm1, stored, new) = lax.scan(
            body, start, (list(moving.values()), flags), self.sizes["c"]
        )
        if not new.real and carry_tm1.real:  # the new carry is the next step's old one
            pairs = zip(carry_tm1.real, self.carry_end.real, strict=True)
            new = Parts([jnp.concatenate([old[1:], end[None]]) for old, end in pairs], new.other)
        self.carry_tm1, self.carry_t = carry_tm1, new
        self.values.known |= {v: Lifted(a, "cb") for v, a in zip(program.carry_tm1, carry_tm1.real, strict=True)}
        self.values.known |= {v: Lifted(a, "cb") for v, a in zip(program.carry_other, carry_tm1.other, strict=True)}
        self.values.known |= {v: Lifted(a, "cb") for v, a in zip(program.stored, stored, strict=True)}

        def output_map(p: Reals, h_t: Reals, h_tm1: Reals, u: Reals) -> tuple[Reals, list]:
            every = jax.vmap(
                jax.vmap(self._output_of_one, (None, *(0,) * 6), axis_size=self.sizes["b"]),
                (None, *(0,) * 6),
                axis_size=self.sizes["c"],
            )
            return every(p, h_t, h_tm1, u, new.other, carry_tm1.other, self.input.other)

        self._output_map = output_map
        real, self._pull_output, other = jax.vjp(
            lambda h_t, h_tm1, u: output_map(self.params.real, h_t, h_tm1, u),
            new.real, carry_tm1.real, self.input.real, has_aux=True,
        )  # fmt: skip
        self.outputs = Parts(real, other)

    def _output_of_one(self, p, h_t, h_tm1, u, h_t_other, h_tm1_other, u_other) -> tuple[Reals, list]:
        """g of one example at one step."""
        parts = self.node.cut.output_parts(p, h_t, h_tm1, u, (self.params.other, h_tm1_other, u_other), h_t_other)
        return parts.real, parts.other

    # --- linear values -----------------------------------------------------------------------------------------------

    def _read(self, atom: Atom) -> Lifted:
        return self.values.get([atom])[0]

    def _ones_pass(self, leaf: int, outputs: Sequence[Atom], rule: Rule) -> Leaves:
        """Linear values for ones on a whole carry leaf: where each depends on one unit, its coefficient."""
        program = self.program
        shape, dtype = self.node.carry.shapes[leaf], self.node.carry.dtypes[leaf]
        seed = {program.cotangents[leaf]: Lifted(jnp.ones(shape, dtype))}
        linear = [e for e in program.program.equations if e.outputs[0] in program.linear]
        needed = backward_slice(linear, outputs)
        return pull(needed, seed, program.linear, self._read, outputs, rule)

    def coefficients(self, variables: Sequence[Any]) -> list[dict[int, Lifted]]:
        """Per variable, for each carry leaf, d variable / d (that leaf's cotangent of its unit)."""
        missing = [v for v in variables if v not in self._coefficients and v not in self.program.cotangents]
        if missing:
            found: dict[Any, dict[int, Lifted]] = {v: {} for v in missing}
            for leaf in range(len(self.program.cotangents)):
                for v, value in zip(missing, self._ones_pass(leaf, missing, bind), strict=True):
                    if value is not None:
                        found[v][leaf] = value
            self._coefficients |= found
        return [self._coefficients.get(v, {}) for v in variables]

    def blocks(self) -> dict[tuple[int, int], Lifted]:
        """D: per new and old carry leaf (r, s) of one shape, d h_t[r] / d h_tm1[s] of the same unit."""
        if self._blocks is None:
            self._blocks = {}
            shapes, flow = self.node.carry.shapes, self.program.localised
            if flow is None:
                self._blocks = self._blocks_from_jacobian()
            else:
                outputs = self.program.to_carry.outputs
                for r in range(len(shapes)):
                    for s, value in enumerate(self._ones_pass(r, outputs, lb.localised(flow))):
                        if value is not None and shapes[r] == shapes[s]:
                            self._blocks[r, s] = value
        return self._blocks

    def _blocks_from_jacobian(self) -> dict[tuple[int, int], Lifted]:
        node, params = self.node, self.params

        def one(h: Parts, u: Parts) -> jax.Array:
            return node.recurrence.blocks(params.real, h.real, u.real, (params.other, h.other, u.other))

        grid = jax.vmap(jax.vmap(one))(self.carry_tm1, self.input)  # (C, batch, K, K, units)
        found: dict[tuple[int, int], Lifted] = {}
        for r, shape in enumerate(node.carry.shapes):
            slot = int(node.units.slot[sum(node.carry.sizes[:r])])
            rows = node.carry.unflatten(from_grid(grid[..., slot, :, :], node.units))
            found |= {(r, s): Lifted(row, "cb") for s, row in enumerate(rows) if node.carry.shapes[s] == shape}
        return found

    def _linear_values(self, wanted: Pull, ct: Leaves, coefficients: list[dict[int, Lifted]], read: Any) -> Leaves:
        """Values of ``wanted`` for a cotangent of the new carry."""
        program, frontier = self.program, {}
        for variable, own in zip(wanted.frontier, coefficients, strict=True):
            if variable in program.cotangents:
                value = ct[program.cotangents.index(variable)]
            else:
                value = add(*(self._term(variable, leaf, c, ct[leaf]) for leaf, c in own.items()))
            if value is not None:
                frontier[variable] = value.map(lambda x, v=variable: x.astype(v.aval.dtype))
        return pull(wanted.equations, frontier, program.linear, read, wanted.outputs)

    def _term(self, variable: Any, leaf: int, coefficient: Lifted, ct: Lifted | None) -> Lifted | None:
        if ct is None:
            return None
        unit = self.program.unit[variable]
        number = (unit - self.program.first_unit[leaf]).clip(0, self.node.carry.sizes[leaf] - 1).ravel()
        if not unit.size:
            return None
        flat = ct.flat()
        return elementwise(
            jnp.multiply, coefficient, flat.map(lambda x: spread(x, number).reshape(*x.shape[:-1], *unit.shape))
        )

    # --- back --------------------------------------------------------------------------------------------------------

    def back(self, recurrence: str, output: Leaves, end: Leaves, rows: int = 1, upto: str = "input") -> Back:
        """Pull cotangents of the outputs and of the last carry back through all steps.

        Args:
          recurrence: how a carry's cotangent goes one step back: "full" (through dF/dh), "local" (through D) or "none"
            (not at all: only what the output owes to its own step).
          output: per real leaf of the output, its cotangent at every step; empty for zero.
          end: per real leaf of the carry, the cotangent of the last one; empty for zero.
          rows: size of axis r, where a cotangent has it.
          upto: "input", or "carry" where the input's cotangent is not wanted.
        """
        sizes = self.sizes | {"r": rows}
        dh_t, dh_tm1, du = self._through_output(output, sizes)
        if not self.node.recurrent:
            return Back([], [], output, du)
        end = end or [None] * len(dh_t)
        if recurrence == "none":
            start: Leaves = []
            steps = dh_t
        else:
            start, steps = self._through_time(recurrence, dh_t, dh_tm1, end, sizes)
        if upto == "input":
            wanted = self.program.to_input
            below = self._linear_values(wanted, steps, self.coefficients(wanted.frontier), self._read)
            du = [add(a, b) for a, b in zip(du, below, strict=True)] if du else below
        return Back(start, steps, output, du)

    def _through_output(self, dy: Leaves, sizes: dict[str, int]) -> tuple[Leaves, Leaves, Leaves]:
        counts = len(self.node.carry.shapes), len(self.node.carry.shapes), len(self.node.input.shapes)
        present = [d for d in dy if d is not None]
        if not present:
            return [None] * counts[0], [None] * counts[1], [None] * counts[2]
        axes = union("cb", *(d.axes for d in present))
        pull_output = self._pull_output if axes == "cb" else jax.vmap(self._pull_output, in_axes=1, out_axes=1)
        found = pull_output(self._full(dy, axes, sizes))
        uses = self.node.cut.output_uses
        groups: list[Leaves] = [[Lifted(leaf, axes) for leaf in group] for group in found]
        h_t, h_tm1, u = groups
        return h_t, h_tm1 if "carry_tm1" in uses else [None] * counts[1], u if "input" in uses else [None] * counts[2]

    def _full(self, dy: Leaves, axes: str, sizes: dict[str, int]) -> list[jax.Array]:
        full = []
        for d, like in zip(dy, self.outputs.real, strict=True):
            shape = (*(sizes[axis] for axis in axes), *like.shape[2:])
            full.append(jnp.zeros(shape, like.dtype) if d is None else broadcast(d, axes, sizes).astype(like.dtype))
        return full

    def _through_time(
        self, recurrence: str, dh_t: Leaves, dh_tm1: Leaves, end: Leaves, sizes: dict[str, int]
    ) -> tuple[Leaves, Leaves]:
        program, shapes = self.program, self.node.carry.shapes
        leaves = range(len(shapes))
        if recurrence == "local":
            table: Any = self.blocks()
            feeds = {(s, r) for r, s in table}
        else:
            wanted = program.to_carry
            coefficients = self.coefficients(wanted.frontier)
            residuals = dict.fromkeys(
                a for e in wanted.equations for a in e.inputs if is_variable(a) and a in program.step
            )
            names = list(residuals)
            table = (coefficients, self.values.get(names))
            feeds = {(s, r) for r in leaves for s in leaves}
        flags = tuple(None if f is None else Lifted(f, "cb") for f in self.flags)
        given = [x for x in (*dh_t, *dh_tm1, *end) if x is not None]
        alive = {i for i in leaves if any(group[i] is not None for group in (dh_t, dh_tm1, end))}
        for _ in leaves:
            alive |= {s for s, r in feeds if r in alive}
        read = [x for x in jax.tree.leaves((table, flags), is_leaf=_is_lifted) if isinstance(x, Lifted)]
        axes = union(*(x.axes for x in (*given, *read))).replace("c", "")
        dtypes = [jnp.result_type(*(x.value for x in given), dtype) for dtype in self.node.carry.dtypes]
        zeros = {i: jnp.zeros((*(sizes[a] for a in axes), *shapes[i]), dtypes[i]) for i in alive}

        def start_value(i: int) -> jax.Array:
            x = end[i]
            return zeros[i] if x is None else broadcast(x, axes, sizes).astype(dtypes[i])

        def body(carry: dict[int, jax.Array], step: Any) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
            now, past, table, (resets, valid) = step
            after = {i: Lifted(x, axes) for i, x in carry.items()}
            total = {i: add(x, now[i]) for i, x in after.items()}
            if valid is not None:
                total = {i: _masked(valid, x) for i, x in total.items()}
            ct = [total.get(i) for i in leaves]
            if recurrence == "local":
                there = [(r, x) for r, x in enumerate(ct) if x is not None]
                pulled = [
                    add(*(elementwise(jnp.multiply, table[r, s], x) for r, x in there if (r, s) in table))
                    for s in leaves
                ]
            else:
                residual = dict(zip(names, table[1], strict=True))
                pulled = self._linear_values(
                    program.to_carry, ct, table[0], lambda a: residual[a] if a in residual else self.values.read(a)
                )
            new = {i: add(pulled[i], past[i]) for i in carry}
            if valid is not None:
                new = {i: add(x, _masked(_not(valid), after[i])) for i, x in new.items()}
            if resets is not None:
                new = {i: _masked(_not(resets), x) for i, x in new.items()}

            def whole(values: dict[int, Lifted | None]) -> dict[int, jax.Array]:
                pairs = values.items()
                return {i: zeros[i] if x is None else broadcast(x, axes, sizes).astype(dtypes[i]) for i, x in pairs}

            return whole(new), whole(total)

        first, steps = scan_back(
            body, {i: start_value(i) for i in sorted(alive)}, (dh_t, dh_tm1, table, flags), self.sizes["c"]
        )
        wrap = [Lifted(first[i], axes) if i in alive else None for i in leaves]
        return wrap, [Lifted(steps[i], "c" + axes) if i in alive else None for i in leaves]

    # --- parameters --------------------------------------------------------------------------------------------------

    def parameters(self, back: Back, keep: str, sizes: dict[str, int]) -> Leaves:
        """Cotangents of the parameters, summed over steps, and over examples unless ``keep`` is "rb"."""
        found: Leaves = [None] * len(self.program.params)
        if self.node.recurrent:
            wanted = self.program.to_params
            deltas = self._linear_values(wanted, back.steps, self.coefficients(wanted.frontier), self._read)
            found = outer.sums(self.program.cuts, deltas, self._read, self.program.linear, keep)
        if "params" not in self.node.cut.output_uses or all(d is None for d in back.output):
            return found
        return [add(a, b) for a, b in zip(found, self._output_parameters(back.output, keep, sizes), strict=True)]

    def _output_parameters(self, dy: Leaves, keep: str, sizes: dict[str, int]) -> Leaves:
        axes = union("cb", *(d.axes for d in dy if d is not None))
        full = self._full(dy, axes, self.sizes | sizes)
        h_t, h_tm1, u = self.carry_t.real, self.carry_tm1.real, self.input.real
        if not keep:
            _, pull_params, _ = jax.vjp(lambda p: self._output_map(p, h_t, h_tm1, u), self.params.real, has_aux=True)
            return [Lifted(leaf) for leaf in pull_params(full)[0]]

        def one(dy, h_t, h_tm1, u, *others) -> list[jax.Array]:
            def every_step(p: Reals) -> tuple[Reals, list]:
                return jax.vmap(self._output_of_one, (None, *(0,) * 6))(p, h_t, h_tm1, u, *others)

            return jax.vjp(every_step, self.params.real, has_aux=True)[1](dy)[0]

        arguments = (h_t, h_tm1, u, self.carry_t.other, self.carry_tm1.other, self.input.other)
        every = jax.vmap(one, in_axes=1, axis_size=self.sizes["b"])
        if "r" in axes:
            every = jax.vmap(every, in_axes=(1, *(None,) * 6))
        return [Lifted(leaf, axes.replace("c", "")) for leaf in every(full, *arguments)]


def inputs_length(inputs: Parts) -> int:
    """C, from any leaf (C, batch, ...)."""
    return (inputs.real + inputs.other)[0].shape[0]


def inputs_batch(inputs: Parts) -> int:
    """The batch size, from any leaf (C, batch, ...)."""
    return (inputs.real + inputs.other)[0].shape[1]


def _is_lifted(x: Any) -> bool:
    return isinstance(x, Lifted)


def _choose(where: jax.Array, values: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(where.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return [choose(a, b) for a, b in zip(values, others, strict=True)]


def _not(flag: Lifted) -> Lifted:
    return flag.map(jnp.logical_not)


def _masked(flag: Lifted, x: Lifted | None) -> Lifted | None:
    """x where the example's flag is set, zero elsewhere."""
    if x is None:
        return None
    wide = flag.map(lambda f: f.reshape(*f.shape, *(1,) * len(x.shape)))
    return elementwise(lambda f, v: jnp.where(f, v, 0), wide, x)
