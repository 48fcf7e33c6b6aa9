"""How a single step moves the traces: chosen once, by the plan.

Own traces with local rows move in place, by factors that wait for the next step. Traces of low rank move as in a
segment of one step, all others with influences going up. What is taken where is what measured fastest: for two dense
layers with all hops, a step with influences going up takes a third of the time of one whose unit vectors go down.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments import joint, single_step, upward
from deepeprop_jax.segments.advance import advance_traces
from deepeprop_jax.segments.gradient import segment_gradient
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.traces.plan import Plan, Traces
from deepeprop_jax.traces.state import join_slots, select_traces, split_slots


class Ran(NamedTuple):
    """A step that has run.

    Attributes:
      carry_t, y_t: the network's carry after it, and its output.
      step: what the gradient and the update of the traces go on from.
    """

    carry_t: PyTree
    y_t: PyTree
    step: Any


class Stepper(Protocol):
    """What a single step needs, beside running forward."""

    @property
    def plan(self) -> Plan:
        """Of the network."""
        ...

    def first_update(self, given: PyTree, params: PyTree, shapes: PyTree) -> PyTree:
        """What waits before the first step: values that move nothing.

        Args:
          given: the user's params.
          params: the same, varying over a mesh as the carry does.
          shapes: of what ``update_of`` gives.
        """
        ...

    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> Ran:
        """The network's step."""
        ...

    def update_of(self, step: Any, given: PyTree) -> PyTree:
        """What waits after a step: all that its update of the traces needs beside its carry and input.

        Args:
          step: ``Ran.step``.
        """
        ...

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        """The parameters of the step that waits; ``params`` are those that the user gives with its gradient."""
        ...

    def advance(self, pending: Any, traces: Traces, once: bool) -> Traces:
        """The traces with the step that waits; ``once`` before a sequence, those across nodes may come packed."""
        ...

    def gradient(self, step: Any, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        """``inst + sum of lambda . S`` of a step, per node and real parameter leaf."""
        ...


class ByFactors(NamedTuple):
    """All traces are own ones with local rows: the factors of the update wait."""

    plan: Plan

    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> Ran:
        """As a segment of one step."""
        return _run_segment(self.plan, params, carry, x)

    def first_update(self, given: PyTree, params: PyTree, shapes: PyTree) -> PyTree:
        """Zeros."""
        return vary_like(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), params)

    def update_of(self, step: Segment, given: PyTree) -> list[single_step.Factors]:
        """D, and dF/dtheta as outer products."""
        return single_step.factors_of(step)

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        """Only the gradient asks for them."""
        return params

    def advance(self, pending: Any, traces: Traces, once: bool) -> Traces:
        """In place, weight by weight."""
        return single_step.advance(self.plan, pending.active, pending.update, traces)

    def gradient(self, step: Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        """Each trace read once."""
        return _gradient(step, traces, dy)


class BySegment(NamedTuple):
    """Traces of low rank: the parameters wait, and the step is run again as a segment."""

    plan: Plan

    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> Ran:
        """As a segment of one step."""
        return _run_segment(self.plan, params, carry, x)

    def first_update(self, given: PyTree, params: PyTree, shapes: PyTree) -> PyTree:
        """Any parameters."""
        return own_copy(given)

    def update_of(self, step: Segment, given: PyTree) -> PyTree:
        """The parameters."""
        return own_copy(given)

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        """Those that wait."""
        return update

    def advance(self, pending: Any, traces: Traces, once: bool) -> Traces:
        """By a segment of one step, or with influences going up."""
        once = once and joint.applies(self.plan, 1, pending.active.shape[0])
        if once:
            traces = joint.pack(self.plan, traces)
        step = single_step.run_step(self.plan, pending.update, pending.carry, pending.x)
        if upward.applies(self.plan) and not once:
            return select_traces(pending.active, upward.update(step, traces), traces)
        moved = advance_traces(step, split_slots(self.plan, traces))
        return select_traces(pending.active, join_slots(self.plan, moved), traces)

    def gradient(self, step: Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        """That of a segment of one step."""
        return _gradient(step, traces, dy)


def stepper_of(plan: Plan) -> Stepper:
    """The cheapest kind that the plan allows."""
    if single_step.applies(plan):
        return ByFactors(plan)
    return BySegment(plan)


def _run_segment(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Ran:
    step = single_step.run_step(plan, params, carry, x)
    return Ran(step.carry_end, jax.tree.map(lambda leaf: leaf[0], step.outputs), step)


def _gradient(step: Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
    return segment_gradient(step, traces, jax.tree.map(lambda leaf: leaf[None], dy), split=False)


def own_copy(tree: PyTree) -> PyTree:
    """The same values in buffers of the state's own: jit hands an unchanged argument through, and a donated state
    would then take the caller's params with it."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
