"""One node over the C steps of a segment: forward, and the pull of a cotangent back through all of its steps.

Everything that is differentiated anywhere in a segment is one call of ``back``: of the loss's cotangents, of ones on a
slot of the last carry (the node's own local trace), of unit vectors on it (dense rows, influences across nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.computed import blocks_from_jacobian, sums
from deepeprop_jax.analysis.node import Node, Pull, Reals
from deepeprop_jax.analysis.units import from_grid
from deepeprop_jax.jaxpr import thin
from deepeprop_jax.jaxpr.batched import Leaves, Lifted, Values, add, bind, broadcast, elementwise, pull, union
from deepeprop_jax.jaxpr.computed_once import computed_once
from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.jaxpr.program import Atom, Rule, Variable, backward_slice, is_variable
from deepeprop_jax.jaxpr.real_leaves import Parts, PyTree, float32_or_wider
from deepeprop_jax.segments.through_time import (
    Carry,
    Entering,
    Flags,
    Past,
    Run,
    last_where_cut_off,
    leading_sizes,
    pull_local,
    through_time,
    with_inputs,
    without_cut_off_steps,
)
from deepeprop_jax.traces.block import spread

_FEW = 2**16
"""Up to so many numbers that rows of all examples add in one step, they are computed as they are read, which compiles
faster."""


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


class NodeSegment:
    """A node that has run through a segment.

    Args:
      node: after analysis.
      params: the node's.
      values: from ``with_inputs``.
      run: from ``run_forward``.
      inputs: (C, batch, ...).
      flags: (C, batch).
      slots_wanted: whether ``slots`` will be asked for: they may then share a loop with the loss's cotangents.

    Attributes:
      outputs: (C, batch, ...) parts of its outputs.
    """

    def __init__(
        self,
        node: Node,
        params: Parts,
        values: Values,
        run: Run,
        inputs: Parts,
        flags: Flags,
        slots_wanted: bool,
    ):
        self.program, self.node, self.params, self.flags, self.run = node.program, node, params, flags, run
        self.sizes = dict(zip("cb", leading_sizes(inputs), strict=True))
        self.values, self.input, self.carry_tm1, self.carry_t = values, inputs, run.carry_tm1, run.new_carry()
        program = node.program
        self.values.known |= {v: Lifted(a, "cb") for v, a in zip(program.carry_tm1, run.carry_tm1.real, strict=True)}
        self.values.known |= {v: Lifted(a, "cb") for v, a in zip(program.carry_other, run.carry_tm1.other, strict=True)}
        self.values.known |= {v: Lifted(a, "cb") for v, a in zip(program.stored, run.stored, strict=True)}
        self._run_output()
        self._coefficients: dict[Atom, dict[int, Lifted]] = {}
        self._blocks: dict[tuple[int, int], Lifted] | None = None
        self._slots: list[tuple[Leaves, Leaves]] | None = None
        self._slots_wanted = slots_wanted

    def after_resets(self) -> NodeSegment:
        """The node as the carry after the segment depends on it; without resets the node itself.

        See ``through_time.last_where_cut_off``.
        """
        resets, program = self.flags.resets, self.program
        if resets is None:
            return self
        run, inputs = without_cut_off_steps(resets, self.run, self.input)
        values = Values(self.values.equations, {v: x for v, x in self.values.known.items() if "c" not in x.axes})
        values.known |= with_inputs(program, values, inputs).known
        moving = [v for v in program.before_loop if self.values.known[v].axes == "cb"]
        before = last_where_cut_off(resets, [self.values.known[v].value for v in moving])
        values.known |= {v: Lifted(x, "cb") for v, x in zip(moving, before, strict=True)}
        return NodeSegment(self.node, self.params, values, run, inputs, self.flags, self._slots_wanted)

    def _run_output(self) -> None:
        new, carry_tm1 = self.carry_t, self.carry_tm1

        def output_map(p: Reals, h_t: Reals, h_tm1: Reals, u: Reals) -> tuple[Reals, list]:
            # Steps and examples as one axis, which XLA on a CPU contracts without copying.
            c, b = self.sizes["c"], self.sizes["b"]
            leaves = (h_t, h_tm1, u, new.other, carry_tm1.other, self.input.other, (new.real, carry_tm1.real))
            flat = jax.tree.map(lambda leaf: leaf.reshape(c * b, *leaf.shape[2:]), leaves)
            every = jax.vmap(self._output_of_one, (None, *(0,) * 7), axis_size=c * b)(p, *flat)
            return jax.tree.map(lambda leaf: leaf.reshape(c, b, *leaf.shape[1:]), every)

        self._output_map = output_map
        real, self._pull_output, other = jax.vjp(
            lambda h_t, h_tm1, u: output_map(self.params.real, h_t, h_tm1, u),
            new.real, carry_tm1.real, self.input.real, has_aux=True,
        )  # fmt: skip
        self.outputs = Parts(real, other)

    def _output_of_one(self, p, h_t, h_tm1, u, h_t_other, h_tm1_other, u_other, point) -> tuple[Reals, list]:
        """g of one example at one step."""
        others = (self.params.other, h_tm1_other, u_other)
        parts = self.node.cut.output(p, h_t, h_tm1, u, others, h_t_other, point)
        return parts.real, parts.other

    # --- linear values -----------------------------------------------------------------------------------------------

    def read(self, atom: Atom) -> Lifted:
        """The value, at every step, of anything that does not depend on a cotangent."""
        return self.values.get([atom])[0]

    def _ones_pass(self, leaf: int, outputs: Sequence[Atom], rule: Rule) -> Leaves:
        """Linear values for ones on a whole carry leaf: where each depends on one unit, its coefficient."""
        program = self.program
        shape, dtype = self.node.carry.shapes[leaf], self.node.carry.dtypes[leaf]
        seed = {program.cotangents[leaf]: Lifted(jnp.ones(shape, dtype))}
        linear = [e for e in program.program.equations if e.outputs[0] in program.linear]
        needed = backward_slice(linear, outputs)
        return pull(needed, seed, program.linear, self.read, outputs, rule)

    def coefficients(self, variables: Sequence[Atom]) -> list[dict[int, Lifted]]:
        """Per variable, for each carry leaf, d variable / d (that leaf's cotangent of its unit)."""
        missing = [v for v in variables if v not in self._coefficients and v not in self.program.cotangents]
        if missing:
            found: dict[Atom, dict[int, Lifted]] = {v: {} for v in missing}
            for leaf in range(len(self.program.cotangents)):
                for v, value in zip(missing, self._ones_pass(leaf, missing, bind), strict=True):
                    if value is not None:
                        found[v][leaf] = value
            self._coefficients |= found
        return [self._coefficients.get(v, {}) for v in variables]

    def blocks(self) -> dict[tuple[int, int], Lifted]:
        """D, the unit-local blocks of ∂F/∂h (eq. 6): per new and old carry leaf (r, s) of one shape, ∂h_t[r]/∂h_tm1[s]
        of the same unit; all else is dropped.

        Ones on the whole of leaf r give every unit's own entry where what mixes units stands still (``local_rule``).
        """
        if self._blocks is None:
            self._blocks = {}
            shapes, rule = self.node.carry.shapes, self.program.local_rule
            if rule is None:
                self._blocks = self._blocks_from_jacobian()
            else:
                outputs = self.program.to_carry.outputs
                for r in range(len(shapes)):
                    for s, value in enumerate(self._ones_pass(r, outputs, rule)):
                        if value is not None and shapes[r] == shapes[s]:
                            self._blocks[r, s] = value
        return self._blocks

    def _blocks_from_jacobian(self) -> dict[tuple[int, int], Lifted]:
        node, params, blocks = self.node, self.params, blocks_from_jacobian(self.node)

        def one(h: Parts, u: Parts) -> jax.Array:
            return blocks(params.real, h.real, u.real, (params.other, h.other, u.other))

        grid = jax.vmap(jax.vmap(one))(self.carry_tm1, self.input)  # (C, batch, K, K, units)
        found: dict[tuple[int, int], Lifted] = {}
        for r, shape in enumerate(node.carry.shapes):
            slot = self._slot_of_leaf()[r]
            if slot is None:
                continue
            rows = node.carry.unflatten(from_grid(grid[..., slot, :, :], node.units))
            found |= {(r, s): Lifted(row, "cb") for s, row in enumerate(rows) if node.carry.shapes[s] == shape}
        return found

    def linear_values(self, wanted: Pull, steps: Leaves) -> Leaves:
        """Values of ``wanted`` at every step, for cotangents of every step's new carry."""
        return self._evaluate(wanted, steps, self.coefficients(wanted.frontier), self.read)

    def frontier(self, wanted: Pull, steps: Leaves) -> dict[Variable, Lifted]:
        """Values of ``wanted.frontier`` at every step, for cotangents of every step's new carry."""
        return self._frontier(wanted, steps, self.coefficients(wanted.frontier))

    def _frontier(self, wanted: Pull, ct: Leaves, coefficients: list[dict[int, Lifted]]) -> dict[Variable, Lifted]:
        program, frontier = self.program, {}
        for variable, own in zip(wanted.frontier, coefficients, strict=True):
            if variable in program.cotangents:
                value = ct[program.cotangents.index(variable)]
            else:
                value = add(*(self._term(variable, leaf, c, ct[leaf]) for leaf, c in own.items()))
            if value is not None:
                frontier[variable] = value.map(lambda x, v=variable: x.astype(v.aval.dtype))
        return frontier

    def _evaluate(
        self, wanted: Pull, ct: Leaves, coefficients: list[dict[int, Lifted]], read: Callable[[Atom], Lifted]
    ) -> Leaves:
        frontier = self._frontier(wanted, ct, coefficients)
        return pull(wanted.equations, frontier, self.program.linear, read, wanted.outputs)

    def _term(self, variable: Variable, leaf: int, coefficient: Lifted, ct: Lifted | None) -> Lifted | None:
        if ct is None:
            return None
        unit, size = self.program.unit[variable], self.node.carry.sizes[leaf]
        if not unit.size or not size:
            return None
        number = thin.core(unit) - self.program.first_unit[leaf]
        inside = (number >= 0) & (number < size)
        where = np.broadcast_to(np.where(inside, number, 0), unit.shape)
        wide = ct.flat().map(lambda x: spread(x, where).reshape(*x.shape[:-1], *unit.shape))
        # Elsewhere the coefficient is zero, but another leaf's cotangent may not be finite.
        wide = wide if inside.all() else wide.map(lambda x: jnp.where(inside, x, 0))
        return elementwise(jnp.multiply, coefficient, wide)

    # --- back --------------------------------------------------------------------------------------------------------

    def back(self, recurrence: Past, output: Leaves, end: Leaves, rows: int = 1, upto: str = "input") -> Back:
        """Pull cotangents of the outputs and of the last carry back through all steps.

        Args:
          recurrence: how a carry's cotangent goes one step back.
          output: per real leaf of the output, its cotangent at every step; empty for zero.
          end: per real leaf of the carry, the cotangent of the last one; empty for zero.
          rows: size of axis r, where a cotangent has it.
          upto: "input", or "carry" where the input's cotangent is not wanted.
        """
        sizes = self.sizes | {"r": rows}
        dh_t, dh_tm1, du = self.through_output(output, sizes)
        if not self.node.recurrent:
            return Back([], [], output, du)
        flow = Entering(dh_t, dh_tm1, end or [None] * len(dh_t))
        if recurrence is Past.NONE:
            start: Leaves = []
            steps = dh_t
        elif recurrence is Past.LOCAL and self._shares_loop():
            (start, steps), *self._slots = self._through_time(recurrence, [flow, *self._slot_flows()], sizes)
        else:
            ((start, steps),) = self._through_time(recurrence, [flow], sizes)
        return self._down(Back(start, steps, output, du), upto)

    def through_output(self, dy: Leaves, sizes: dict[str, int]) -> tuple[Leaves, Leaves, Leaves]:
        """Cotangents of the new carry, the old carry and the input at every step, from those of the output."""
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
        return vary_like(full, self.outputs.real)

    def _down(self, back: Back, upto: str) -> Back:
        """Add what the input's cotangent gets from the new carry's."""
        if upto != "input":
            return back
        below = self.linear_values(self.program.to_input, back.steps)
        return back._replace(input=[add(a, b) for a, b in zip(back.input, below, strict=True)] if back.input else below)

    def _shares_loop(self) -> bool:
        """Whether ``slots`` goes through one loop with other cotangents.

        Where it is the same for all examples, XLA takes its loop out of the loop over segments; with resets it is that
        of ``after_resets``.
        """
        if not self._slots_wanted or self._slots is not None or self.flags.resets is not None:
            return False
        return self.flags.valid is not None or any("b" in x.axes for x in self.blocks().values())

    def slots(self) -> list[tuple[Leaves, Leaves]]:
        """Per slot of a unit, for ones on that slot of the last carry: the cotangents at the start and at every step.

        They never leave their unit, so this holds dh_end/dh_t of every unit. Run in one loop with the loss's, if any,
        where they differ between examples.
        """
        if self._slots is None:
            self._slots = self._through_time(Past.LOCAL, self._slot_flows(), self.sizes)
        return self._slots

    def _slot_of_leaf(self) -> list[int | None]:
        """The slot of each carry leaf; None for one without components."""
        starts = np.cumsum([0, *self.node.carry.sizes])
        slot = self.node.units.slot
        return [int(slot[start]) if size else None for start, size in zip(starts, self.node.carry.sizes, strict=False)]

    def _slot_flows(self) -> list[Entering]:
        node = self.node
        nothing: Leaves = [None] * len(node.carry.shapes)
        slots = self._slot_of_leaf()
        return [
            Entering(
                nothing,
                nothing,
                [
                    Lifted(jnp.ones(shape, float32_or_wider(dtype))) if of == slot else None
                    for of, shape, dtype in zip(slots, node.carry.shapes, node.carry.dtypes, strict=True)
                ],
            )
            for slot in range(node.units.slots)
        ]

    def back_slot(self, slot: int) -> Back:
        """``back`` through D for ones on a slot of the last carry; no further than to the carry."""
        return Back(*self.slots()[slot], [], [])

    def _through_time(
        self, recurrence: Past, flows: list[Entering], sizes: dict[str, int]
    ) -> list[tuple[Leaves, Leaves]]:
        # Sums and products over many steps: float32 at least, whatever the carry is held in.
        carry = Carry(self.node.carry.shapes, [float32_or_wider(d) for d in self.node.carry.dtypes])
        leaves = range(len(carry.shapes))
        if recurrence is Past.LOCAL:
            blocks = self.blocks()
            return through_time(pull_local, blocks, set(blocks), flows, self.flags, carry, sizes)
        wanted = self.program.to_carry
        read = (a for e in wanted.equations for a in e.inputs if is_variable(a) and a in self.program.step)
        names = list(dict.fromkeys(read))
        table = (self.coefficients(wanted.frontier), self.values.get(names))

        def pull_full(ct: Leaves, now: PyTree) -> Leaves:
            residual = dict(zip(names, now[1], strict=True))
            return self._evaluate(wanted, ct, now[0], lambda a: residual[a] if a in residual else self.values.read(a))

        everywhere = {(r, s) for r in leaves for s in leaves}
        return through_time(pull_full, table, everywhere, flows, self.flags, carry, sizes)

    # --- parameters --------------------------------------------------------------------------------------------------

    def parameters(self, back: Back, keep: str, sizes: dict[str, int]) -> Leaves:
        """Cotangents of the parameters, summed over steps, and over examples unless ``keep`` is "rb"."""
        found: Leaves = [None] * len(self.program.params)
        if self.node.recurrent:
            wanted = self.program.to_params
            deltas = self.linear_values(wanted, back.steps)
            if keep == "rb" and self.sizes["c"] == 1 and sizes["b"] * sizes["r"] * self.node.params.size > _FEW:
                # No product sums over steps: each entry of a weight would compute its delta anew.
                deltas = computed_once(deltas)
            found = sums(self.program.cuts, deltas, self.read, self.program.linear, keep)
        if "params" not in self.node.cut.output_uses or all(d is None for d in back.output):
            return found
        return [add(a, b) for a, b in zip(found, self.output_parameters(back.output, keep, sizes), strict=True)]

    def output_parameters(self, dy: Leaves, keep: str, sizes: dict[str, int]) -> Leaves:
        """Cotangents of the parameters that g reads, from those of the output; see ``parameters``."""
        axes = union("cb", *(d.axes for d in dy if d is not None))
        full = self._full(dy, axes, self.sizes | sizes)
        h_t, h_tm1, u = self.carry_t.real, self.carry_tm1.real, self.input.real
        if not keep:
            _, pull_params, _ = jax.vjp(lambda p: self._output_map(p, h_t, h_tm1, u), self.params.real, has_aux=True)
            return [Lifted(leaf) for leaf in pull_params(full)[0]]

        def one(dy, h_t, h_tm1, u, *others) -> list[jax.Array]:
            def every_step(p: Reals) -> tuple[Reals, list]:
                return jax.vmap(self._output_of_one, (None, *(0,) * 7))(p, h_t, h_tm1, u, *others)

            return jax.vjp(every_step, self.params.real, has_aux=True)[1](dy)[0]

        arguments = (h_t, h_tm1, u, self.carry_t.other, self.carry_tm1.other, self.input.other, (h_t, h_tm1))
        every = jax.vmap(one, in_axes=1, axis_size=self.sizes["b"])
        if "r" in axes:
            every = jax.vmap(every, in_axes=(1, *(None,) * 7))
        return [Lifted(leaf, axes.replace("c", "")) for leaf in every(full, *arguments)]
