"""How a single step moves the traces: chosen once, by the plan.

Own traces with local rows move in place, by factors that wait for the next step; traces of low rank by a segment of one
step; all others on the lattice, where influences go up. What is taken where is what measured fastest: for two dense
layers with all hops, a step on the lattice takes a third of the time of one as a segment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.lattice import step as lattice
from deepeprop_jax.learner.contract import Pending
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments import joint, single_step
from deepeprop_jax.segments.advance import advance_traces
from deepeprop_jax.segments.gradient import segment_gradient
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import Traces, join_slots, select_traces, split_slots

Inside = TypeVar("Inside")


class Stepper(ABC, Generic[Inside]):
    """What a single step needs. Where nothing else is said its parameters wait in the state, and it is run again.

    Args:
      plan: of the network.
      update: shapes and dtypes of what waits.
    """

    def __init__(self, plan: Plan, update: PyTree):
        self.plan, self.update = plan, update

    @abstractmethod
    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree, Inside]:
        """The network's carry after the step, its output, and what gradient and traces go on from."""

    @abstractmethod
    def advance(self, pending: Pending, traces: Traces) -> Traces:
        """The traces with the step that waits."""

    @abstractmethod
    def gradient(self, step: Inside, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        """``inst + sum of lambda . S`` of a step, per node and real parameter leaf."""

    def first_update(self, given: PyTree, params: PyTree) -> PyTree:
        """What waits before the first step: values that move nothing.

        Args:
          given: the user's params.
          params: the same, varying over a mesh as the carry does.
        """
        return own_copy(given)

    def update_of(self, step: Inside, given: PyTree) -> PyTree:
        """What waits after a step: all that its update of the traces needs beside its carry and input."""
        return own_copy(given)

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        """The parameters of the step that waits; ``params`` are those that the user gives with its gradient."""
        return update


class BySegment(Stepper[Segment]):
    """A segment of one step."""

    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree, Segment]:
        step = single_step.run_step(self.plan, params, carry, x)
        return step.carry_end, jax.tree.map(lambda leaf: leaf[0], step.outputs), step

    def advance(self, pending: Pending, traces: Traces) -> Traces:
        step = single_step.run_step(self.plan, pending.update, pending.carry, pending.x)
        moved = advance_traces(step, split_slots(self.plan, traces))
        return select_traces(pending.active, join_slots(self.plan, moved), traces)

    def gradient(self, step: Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        every = jax.tree.map(lambda leaf: leaf[None], dy)
        return segment_gradient(step, split_slots(self.plan, traces), every, exact=False)


class ByFactors(BySegment):
    """A segment of one step whose traces are own ones with local rows: D, and dF/dtheta as outer products, wait."""

    def advance(self, pending: Pending, traces: Traces) -> Traces:
        return single_step.advance(self.plan, pending.active, pending.update, traces)

    def gradient(self, step: Segment, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        return single_step.gradient(step, traces, dy)

    def first_update(self, given: PyTree, params: PyTree) -> PyTree:
        return vary_like(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.update), params)

    def update_of(self, step: Segment, given: PyTree) -> list[single_step.Factors]:
        return single_step.factors_of(step)

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        return params  # only the gradient asks for them


class ByLattice(Stepper[lattice.Moments]):
    """Dense rows and influences across nodes: influences go up, and right in time."""

    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree, lattice.Moments]:
        return lattice.forward(self.plan, params, carry, x)

    def advance(self, pending: Pending, traces: Traces) -> Traces:
        moments = self.run(pending.update, pending.carry, pending.x)[2]
        moved = lattice.update(self.plan, moments, lattice.local_blocks(self.plan, moments), traces)
        return select_traces(pending.active, moved, traces)

    def gradient(self, step: lattice.Moments, traces: Traces, dy: PyTree) -> list[list[jax.Array]]:
        return lattice.gradient(self.plan, step, lattice.local_blocks(self.plan, step), traces, dy)


def stepper_of(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Stepper:
    """The cheapest kind that the plan allows, from the shapes of what a step takes."""
    if not single_step.applies(plan):
        return ByLattice(plan, params) if plan.rank is None else BySegment(plan, params)

    def factors(params: PyTree, carry: PyTree, x: PyTree) -> list[single_step.Factors]:
        return single_step.factors_of(single_step.run_step(plan, params, carry, x))

    return ByFactors(plan, jax.eval_shape(factors, params, carry, x))


def before_sequence(stepper: Stepper, pending: Pending, traces: Traces) -> Traces:
    """The traces with the step that waits; of many small nodes packed, as the sequence goes on with them."""
    if joint.applies(stepper.plan, 1, pending.active.shape[0]):
        return BySegment(stepper.plan, stepper.update).advance(pending, joint.pack(stepper.plan, traces))
    return stepper.advance(pending, traces)


def own_copy(tree: PyTree) -> PyTree:
    """The same values in buffers of the state's own: jit hands an unchanged argument through, and a donated state
    would then take the caller's params with it."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
