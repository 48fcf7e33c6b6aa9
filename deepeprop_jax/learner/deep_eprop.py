"""``deep_eprop``: a network becomes an online learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.mesh_axes import summed_like, vary_alike, vary_like
from deepeprop_jax.jaxpr.real_leaves import select_examples
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.contract import (
    Gradient,
    Init,
    LearnerState,
    OnlineLearner,
    Pending,
    Reset,
    RunSequence,
    Step,
    ValueAndGrad,
    documented_by,
)
from deepeprop_jax.learner.planner import Planner
from deepeprop_jax.learner.sequence import Stream, as_params, by_segments, choose_length, keep_examples, make_sequence
from deepeprop_jax.learner.sharded import over_batches
from deepeprop_jax.network.arguments import as_arrays, as_avals, batch_size, check_same
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import Cell, PyTree, graph_of, remade
from deepeprop_jax.segments import advance as segment_update
from deepeprop_jax.segments import gradient as segment_gradient
from deepeprop_jax.segments import joint as segment_joint
from deepeprop_jax.segments import single_step as stream
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.traces import slots
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import Traces, select_traces, trace_shapes


def deep_eprop(
    network: Any, *, exact: bool = False, hops: int | None = None, rank: int | None = None, trainable: Any = None
) -> OnlineLearner:
    """Train a recurrent network forward in time: gradients from traces, with memory constant in the sequence's length.

    ``exact=True`` is deep RTRL and equals BPTT; the default is deep e-prop, in which the recurrence dF/dh of every
    node counts only inside its units (a unit is one index of the carry; leaves of one shape share their units).

    *Exact when* every node is element-wise in its carry (LRU, IndRNN, LIF without lateral weights) and hops=None.

    *Cost* per step, with n the size of a carry and |theta| that of a node's parameters: a node's own trace has
    K |theta| numbers (K carry slots of a unit; n |theta| where a parameter reaches several units, or with ``exact``
    unless the node is element-wise), the trace of a lower node's parameters n |theta|. ``analyse`` prints it for a
    given network.

    Args:
      network: a Flax module (a Linen one, or an NNX instance), a ``Cell`` (from ``stack``, ``graph``, ``linen_cell``,
        ``nnx_cell`` or by hand), or a plain function ``(params, carry, x) -> (carry, y)`` written for one example.
      exact: full deep RTRL instead of deep e-prop.
      hops: how many recurrent layers upward a parameter's trace is carried: None for all; 0 for the own node only, with
        the instantaneous signal through the layers above (Zucchet et al. 2023).
      rank: R keeps a node's own trace of its weights as one product of that rank, R (K N + M) numbers for N rows and M
        columns, the best that one step of subspace iteration per segment finds. Biases, and whatever has dense rows
        (all traces in exact mode, unless the node is element-wise), are kept whole. ``trace_error`` tells from the
        state what was lost. Pays with batches and long segments: a ``step`` costs as much as a segment.
      trainable: booleans in the structure of params or a prefix of it, or a function of params' shapes that gives
        them; the others have no trace and a zero gradient.

    Returns:
      An ``OnlineLearner`` of pure functions.

    Raises:
      TypeError: something that is not a network; an option of a wrong type.
      ValueError: an option out of range.

    References:
      B. Millidge, "Generalizing E-prop to Deep Networks" (arXiv:2512.24506), eq. 9 to 11.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> learner = deep_eprop(nn.GRUCell(features=4))
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> state = learner.init(params, carry, xs[0])
    >>> loss_fn = lambda y, target: jnp.mean((y - target) ** 2)
    >>> (loss, state), grads = learner.value_and_grad(loss_fn)(params, state, xs, jnp.zeros(6))
    >>> jax.tree.structure(grads) == jax.tree.structure(params)
    True
    """
    checks.check_options(exact, hops, rank)
    cell = as_cell(network)
    graph = graph_of(cell)
    learner = learner_with(Planner(graph, exact, hops, trainable, rank), cell)
    return remade(learner, deep_eprop, cell, exact=exact, hops=hops, rank=rank, trainable=trainable)


def learner_with(planner: Planner, cell: Cell) -> OnlineLearner:
    """The learner of a network whose plans are made by ``planner``."""
    graph, plan_of = planner.graph, planner.plan

    def plan_for(params: PyTree, state: LearnerState, x: PyTree) -> Plan:
        """The plan for a state, which is checked."""
        checks.check_state(graph, state)
        checks.check_step_input(x, state.pending.x)
        plan = plan_of(params, state.carry, x)
        batch = batch_size(state.carry, x)
        check_same(state.traces, trace_shapes(plan, batch), "the state's traces", checks.STATE_REMEDY)
        update = planner.pending_update(params, state.carry, x)
        check_same(state.pending.update, update, "the state's pending update", checks.STATE_REMEDY)
        return plan

    @documented_by(Init)
    def init(params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        given, carry, x = _arrays(params=params, carry=carry, x=x)
        params, carry, x = vary_alike(given, carry, x)
        plan = plan_of(params, carry, x)
        batch = batch_size(carry, x)
        traces = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), trace_shapes(plan, batch))
        update = _own_copy(given)
        if stream.applies(plan):
            factors = planner.pending_update(params, carry, x)
            update = vary_like(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), factors), params)
        pending = Pending(_own_copy(carry), _own_copy(x), update, jnp.zeros(batch, bool))
        return _vary(LearnerState(_own_copy(carry), traces, pending, _own_copy(carry)), params, carry, x)

    def run_step(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Segment:
        return stream.run_step(plan, params, carry, x)

    def flush(plan: Plan, state: LearnerState, once: bool = False) -> Traces:
        """Apply the pending trace update; ``once`` before a sequence, traces may come as ``segment_joint.pack``'s."""
        carry, x, update, active = state.pending
        if stream.applies(plan):
            return stream.update(plan, active, update, state.traces)
        traces, together = state.traces, once and segment_joint.applies(plan, 1, active.shape[0])
        traces = segment_joint.pack(plan, traces) if together else traces
        moved = segment_update.update(run_step(plan, update, carry, x), slots.split_slots(plan, traces))
        return select_traces(active, slots.join_slots(plan, moved), traces)

    @documented_by(Step)
    def step(params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        given, state, x = _arrays(params=params, state=state, x=x)
        params, state, x = vary_alike(given, state, x)
        plan = plan_for(params, state, x)
        traces = flush(plan, state)
        now = run_step(plan, params, state.carry, x)
        update = stream.factors_of(now) if stream.applies(plan) else _own_copy(given)
        pending = Pending(state.carry, _own_copy(x), update, jnp.ones_like(state.pending.active))
        new = checks.next_state(LearnerState(now.carry_end, traces, pending, state.initial_carry), state)
        return _vary(new, params), vary_like(_at_its_step(now.outputs), params)

    @documented_by(Gradient)
    def gradient(params: PyTree, state: LearnerState, dy: PyTree) -> PyTree:
        given, state = _arrays(params=params, state=state)
        params, state, dy = vary_alike(given, state, dy)
        plan = plan_for(params, state, state.pending.x)
        carry, x, update, active = state.pending
        if not isinstance(active, jax.core.Tracer) and not active.any():
            raise ValueError("No step is pending in this state. Call learner.step first, then learner.gradient.")
        now = run_step(plan, params if stream.applies(plan) else update, carry, x)
        dy = keep_examples(active, checks.check_cotangent(dy, _at_its_step(now.outputs)))
        if stream.applies(plan):
            found = stream.gradient(now, state.traces, dy)
        else:
            every = jax.tree.map(lambda leaf: leaf[None], dy)
            found = segment_gradient.gradient(now, slots.split_slots(plan, state.traces), every, exact=False)
        found = [[jnp.where(active.any(), leaf, jnp.nan) for leaf in leaves] for leaves in found]
        return summed_like(as_params(plan, found), given)

    @documented_by(ValueAndGrad)
    def value_and_grad(
        loss_fn: Callable[..., Any],
        *,
        segment_length: int | None = None,
        within_segment: str = "eprop",
        has_aux: bool = False,
    ) -> Callable[..., Any]:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (y_t, target_t) -> scalar; seen {type(loss_fn).__name__}.")
        checks.check_segments(segment_length, within_segment)

        @documented_by(RunSequence)
        def run(params, state, xs, targets, resets=None, valid=None):
            params, state, xs = _arrays(params=params, state=state, xs=xs)
            steps = checks.sequence_length(xs, targets)
            given, update = params, state.pending.update if isinstance(state, LearnerState) else None
            params, state, xs, targets, resets, valid = vary_alike(params, state, xs, targets, resets, valid)
            x = jax.tree.map(lambda leaf: leaf[0], xs)
            plan = plan_for(params, state, x)
            sequence = make_sequence(plan, loss_fn, has_aux, state.initial_carry, xs, targets, resets, valid)
            batch = batch_size(state.carry, x)
            length = segment_length or choose_length(plan, batch, steps).steps
            start = Stream(state.carry, flush(plan, state, once=True))
            result = by_segments(plan, params, start, sequence, length, within_segment == "exact")
            pending = state.pending._replace(active=jnp.zeros_like(state.pending.active), update=update)
            end = LearnerState(result.end.carry, result.end.traces, pending, state.initial_carry)
            loss = (result.loss, result.aux) if has_aux else result.loss
            end = _vary(checks.next_state(end, state), params)
            return (loss, end), summed_like(as_params(plan, result.grads), given)

        return run

    @documented_by(Reset)
    def reset(state: LearnerState, where: jax.Array) -> LearnerState:
        (state,) = _arrays(state=state)
        checks.check_state(graph, state)
        where = checks.check_flags(where, state.pending.active.shape, "where")
        update = state.pending.update
        state, where = vary_alike(state, where)
        traces = select_traces(where, jax.tree.map(jnp.zeros_like, state.traces), state.traces)
        # ``gradient`` gives such an example zero, but zero times a number that is not finite would be none.
        carry = select_examples(where, state.initial_carry, state.pending.carry)
        x = select_examples(where, jax.tree.map(_finite, state.pending.x), state.pending.x)
        pending = Pending(carry, x, update, state.pending.active & ~where)
        return LearnerState(
            select_examples(where, state.initial_carry, state.carry), traces, pending, state.initial_carry
        )

    def plan(params: PyTree, carry: PyTree, x: PyTree) -> Plan:
        """What was found out about the network, for arrays or for shapes; made once per shapes and kept."""
        named = {"params": params, "carry": carry, "x": x}
        return plan_of(*(as_avals(tree, what) for what, tree in named.items()))

    learner = OnlineLearner(init, step, gradient, value_and_grad, reset, cell, plan)
    return over_batches(learner, graph, stream.Factors)


def _arrays(**named: PyTree) -> list[Any]:
    """The arguments with strongly typed arrays as leaves."""
    return [as_arrays(tree, what) for what, tree in named.items()]


def _at_its_step(outputs: PyTree) -> PyTree:
    """The outputs of a segment of one step."""
    return jax.tree.map(lambda leaf: leaf[0], outputs)


def _vary(state: LearnerState, *others: PyTree) -> LearnerState:
    """See ``devices.vary_like``; what waits for the next step may be params, which need not vary."""
    moved, update = vary_like(state, *others), state.pending.update
    return moved._replace(pending=moved.pending._replace(update=update))


def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(leaf), leaf, 0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _own_copy(tree: PyTree) -> PyTree:
    """The same values in buffers of the state's own: jit hands an unchanged argument through, and a donated state
    would then take the caller's params with it."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
