"""How a single step moves the traces: chosen once, by the plan.

Own traces with local rows move in place, by factors that wait for the next step. Traces of low rank move as in a
segment of one step, all others with influences going up. What is taken where is what measured fastest: for two dense
layers with all hops, a step with influences going up takes a third of the time of one whose unit vectors go down.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.mesh_axes import vary_like
from deepeprop_jax.learner.contract import LearnerState
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.segments import joint, single_step, upward, window
from deepeprop_jax.segments.advance import advance_traces
from deepeprop_jax.segments.gradient import segment_gradient
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.traces.plan import Given, Plan, Traces
from deepeprop_jax.traces.state import join_slots, reset_traces, select_traces, split_slots, without_examples


class Stepper:
    """A segment of one step. Where nothing else is said its parameters wait in the state, and it is run again.

    Args:
      plan: of the network.
      update: shapes and dtypes of what waits.
    """

    def __init__(self, plan: Plan, update: PyTree):
        self.plan, self.update = plan, update

    def run(self, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree, Segment]:
        """The network's carry after the step, its output, and what gradient and traces go on from."""
        step = single_step.run_step(self.plan, params, carry, x)
        return step.carry_end, jax.tree.map(lambda leaf: leaf[0], step.outputs), step

    def advance(self, state: LearnerState) -> Traces:
        """The traces with the step that waits."""
        pending, traces = state.pending, state.traces
        step = single_step.run_step(self.plan, pending.update, pending.carry, pending.x)
        moved = advance_traces(step, split_slots(self.plan, traces))
        return select_traces(pending.active, join_slots(self.plan, moved), traces)

    def last(self, params: PyTree, state: LearnerState) -> Segment:
        """The step that waits, run again: what its gradient goes on from.

        Args:
          params: those that the user gives with its gradient.
        """
        pending = state.pending
        return self.run(self.params_of(params, pending.update), pending.carry, pending.x)[2]

    def gradient(self, step: Segment, traces: Traces, dy: PyTree, given: Given) -> list[list[jax.Array]]:
        """``inst + sum of lambda . S`` of a step, per node and real parameter leaf."""
        dy, given = jax.tree.map(lambda leaf: leaf[None], (dy, given))
        return segment_gradient(step, traces, dy, given, split=False)

    def first_update(self, given: PyTree, params: PyTree, carry: PyTree) -> PyTree:
        """What waits before the first step: values that move nothing.

        Args:
          given: the user's params.
          params: the same, varying over a mesh as the carry does.
        """
        return own_copy(given)

    def update_of(self, step: Segment, given: PyTree, before: LearnerState, x: PyTree) -> PyTree:
        """What waits after a step: all that its update of the traces needs beside its carry and input.

        Args:
          before: the state before it.
        """
        return own_copy(given)

    def after_sequence(self, update: PyTree, carry: PyTree) -> PyTree:
        """What waits after a sequence that ended with ``carry``: nothing."""
        return update

    def projects(self, update: PyTree) -> jax.Array | bool:
        """Whether a step after ``update`` projects the carry."""
        return False

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        """The parameters of the step that waits; ``params`` are those that the user gives with its gradient."""
        return update


class ByFactors(Stepper):
    """A segment of one step whose traces are own ones with local rows: D, and dF/dtheta as outer products, wait."""

    def advance(self, state: LearnerState) -> Traces:
        return single_step.advance(self.plan, state.pending.active, state.pending.update, state.traces)

    def first_update(self, given: PyTree, params: PyTree, carry: PyTree) -> PyTree:
        return vary_like(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.update), params)

    def update_of(self, step: Segment, given: PyTree, before: LearnerState, x: PyTree) -> list[single_step.Factors]:
        return single_step.factors_of(step)

    def params_of(self, params: PyTree, update: PyTree) -> PyTree:
        return params  # only the gradient asks for them


class Upward(Stepper):
    """A segment of one step whose traces have dense rows, or are across nodes: influences go up, and right in time."""

    def advance(self, state: LearnerState) -> Traces:
        pending, traces = state.pending, state.traces
        step = single_step.run_step(self.plan, pending.update, pending.carry, pending.x)
        return select_traces(pending.active, upward.update(step, traces), traces)


class Windowed(Stepper):
    """The steps since the last projection of the carry wait, and are a segment."""

    def advance(self, state: LearnerState) -> Traces:
        return self.project(state, self.update.steps)

    def project(self, state: LearnerState, least: int) -> Traces:
        """The traces, moved if ``least`` steps wait."""
        pending, plan = state.pending, self.plan

        def project() -> Traces:
            part = window.run(plan, pending.update, state.initial_carry)
            kept = without_examples(plan, window.resets_of(part), split_slots(plan, state.traces))
            moved = join_slots(plan, advance_traces(part.after_resets(), kept))
            return reset_traces(~pending.active, moved)  # nothing is behind an example that was reset since

        return lax.cond(pending.update.count >= least, project, lambda: state.traces)

    def last(self, params: PyTree, state: LearnerState) -> Segment:
        return window.run(self.plan, state.pending.update, state.initial_carry)

    def gradient(self, step: Segment, traces: Traces, dy: PyTree, given: Given) -> list[list[jax.Array]]:
        kept = without_examples(self.plan, window.resets_of(step), split_slots(self.plan, traces))
        return segment_gradient(step, kept, *window.at_last(step, (dy, given)))

    def first_update(self, given: PyTree, params: PyTree, carry: PyTree) -> window.Window:
        waiting = self.update.xs, self.update.resets
        zeros = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), waiting)
        xs, resets = vary_like(zeros, params, carry)
        return window.emptied(window.Window(own_copy(given), carry, xs, resets, self.update.count), own_copy(carry))

    def update_of(self, step: Segment, given: PyTree, before: LearnerState, x: PyTree) -> window.Window:
        waiting, active = before.pending.update, before.pending.active
        return window.with_step(waiting, own_copy(given), before.carry, x, active)

    def after_sequence(self, update: window.Window, carry: PyTree) -> window.Window:
        return window.emptied(update, own_copy(carry))

    def projects(self, update: window.Window) -> jax.Array:
        return update.count >= self.update.steps


def stepper_of(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Stepper:
    """The cheapest kind that the plan allows, from the shapes of what a step takes."""
    if plan.projection is not None:
        return Windowed(plan, window.shapes(params, carry, x, plan.projection.every))
    if not single_step.applies(plan):
        return Upward(plan, params) if upward.applies(plan) else Stepper(plan, params)

    def factors(params: PyTree, carry: PyTree, x: PyTree) -> list[single_step.Factors]:
        return single_step.factors_of(single_step.run_step(plan, params, carry, x))

    return ByFactors(plan, jax.eval_shape(factors, params, carry, x))


def before_sequence(stepper: Stepper, state: LearnerState) -> Traces:
    """The traces with the steps that wait; of many small nodes packed, as the sequence goes on with them."""
    if isinstance(stepper, Windowed):
        return stepper.project(state, least=1)
    if joint.applies(stepper.plan, 1, state.pending.active.shape[0]):
        packed = state._replace(traces=joint.pack(stepper.plan, state.traces))
        return Stepper(stepper.plan, stepper.update).advance(packed)
    return stepper.advance(state)


def own_copy(tree: PyTree) -> PyTree:
    """The same values in buffers of the state's own: jit hands an unchanged argument through, and a donated state
    would then take the caller's params with it."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
