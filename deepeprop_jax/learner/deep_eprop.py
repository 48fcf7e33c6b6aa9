"""``deep_eprop``: a network becomes an online learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.mesh_axes import any_anywhere, summed_like, vary_alike, vary_like, varying_axes
from deepeprop_jax.jaxpr.real_leaves import select_examples
from deepeprop_jax.learner import checks, contract
from deepeprop_jax.learner.by_segments import by_segments, choose_length
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, Pending, documented_by
from deepeprop_jax.learner.data_parallel import how_held
from deepeprop_jax.learner.each_example import of_each_example
from deepeprop_jax.learner.layout import with_layouts
from deepeprop_jax.learner.planner import Planner
from deepeprop_jax.learner.sequence import Stream, as_params, batched_output, keep_examples, make_sequence
from deepeprop_jax.learner.sharded import batch_axes, over_batches
from deepeprop_jax.learner.signals import Signal, by_index, check_functions, shaped
from deepeprop_jax.learner.stepper import Stepper, before_sequence, own_copy, stepper_of
from deepeprop_jax.network.arguments import as_arrays, as_avals, batch_size, check_same
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import PyTree, graph_of, remade
from deepeprop_jax.segments.window import Window, without_examples
from deepeprop_jax.traces.plan import Given, Mode, Plan, Traces
from deepeprop_jax.traces.projected import NAME
from deepeprop_jax.traces.state import first_traces, reset_traces, trace_shapes


def deep_eprop(
    network: object,
    *,
    exact: bool = False,
    hops: int | None = None,
    rank: int | None = None,
    carry_rank: int | None = None,
    own_traces: bool = False,
    project_every: int = 8,
    carry_factor: int | None = None,
    signals: tuple[str, ...] = (),
    trainable: PyTree = None,
) -> OnlineLearner:
    """Train a recurrent network forward in time: gradients from traces, with memory constant in the sequence's length.

    ``exact=True`` is deep RTRL and equals BPTT; the default is deep e-prop, in which the recurrence dF/dh of every
    node counts only inside its units (a unit is one index of the carry; leaves of one shape share their units).

    *Exact when* every node is element-wise in its carry (LRU, IndRNN, LIF without lateral weights) and hops=None.

    *Cost* per step, with n the size of a carry and |theta| that of a node's parameters: a node's own trace has
    K |theta| numbers (K carry slots of a unit; n |theta| where a parameter reaches several units, or with ``exact``
    unless the node is element-wise), the trace of a lower node's parameters n |theta|. ``analyse`` prints it for a
    given network. Where all nodes above only filter the output of the one below (leaky readouts, linear memories whose
    constants are numbers) it is |theta| for each constant: the filtered trace is held, and the filter's weights are
    taken as they are when a gradient is asked for, also for steps from before they changed.

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
      carry_rank: R projects all influences on the carries on R directions of theirs, in place of all other traces: R
        numbers for each parameter and example, whatever the carries' size. Credit inside a segment is exact, and goes
        across its start along these directions: the gradient depends on the segments' length, and with as many
        directions as the carries have numbers it is BPTT's. They are learnt by ``carry_basis``, and given to a state by
        ``with_basis``; ``init`` begins with random ones, always the same. A segment costs R more reverse passes, and
        passes over R numbers for each parameter.
      own_traces: with ``carry_rank``: beside it keep each node's own trace, as with ``hops=0``; the directions then
        hold what it does not.
      project_every: with ``carry_rank``: single steps wait in the state, up to so many, and their carry is projected
        once; ``gradient`` goes back through them exactly, which costs as many steps. They are run again at the
        parameters of the last of them.
      carry_factor: with ``carry_rank``: q keeps what the projected carry holds of a node's weights as one product of
        rank q, q (R N + M) numbers for N rows and M columns in place of R N M; see ``rank``, of which the same is true.
        Weights whose step is no outer product as it stands (dense nodes without a carry, cells whose output reads
        parameters, ``stack(cell, depth=L)``) are kept whole.
      signals: names of nodes (of ``learner.network.graph.nodes``; of a stack "0", "1", ...) whose learning signal will
        be given to ``value_and_grad`` and ``gradient``, in place of what would come from above: random feedback, a
        reward. The nodes above take their outputs as constants, so that no influence is carried across them. A loss
        on such an output itself counts as always.
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
    mode = Mode(exact, hops, rank, carry_rank, own_traces, project_every, carry_factor, signals)
    checks.check_options(mode)
    cell = as_cell(network)
    made = _Functions(Planner(graph_of(cell), mode, trainable))
    in_time: Callable[..., PyTree] = made.value_and_grad
    learner = OnlineLearner(made.init, made.step, made.gradient, in_time, made.reset, cell, made.plan)

    @documented_by(contract.ShardingsOf)
    def shardings(mesh, params, carry, x, *, batch=None, unit=None) -> contract.Shardings:
        return how_held(learner, mesh, params, carry, x, batch, unit)

    learner = over_batches(learner, graph_of(cell))
    learner = learner._replace(value_and_grad=with_layouts(learner.value_and_grad), shardings=shardings)
    return remade(learner, deep_eprop, cell, **mode._asdict(), trainable=trainable)


class _Functions:
    """The functions of a learner; pure, but for the plans that they keep."""

    def __init__(self, planner: Planner):
        self._planner, self._graph = planner, planner.graph

    def _stepper_for(self, params: PyTree, state: LearnerState, x: PyTree) -> Stepper:
        """What steps a state, which is checked."""
        checks.check_state(self._graph, state)
        checks.check_step_input(x, state.pending.x)
        stepper = self._planner.once(stepper_of, params, state.carry, x)
        shapes = trace_shapes(stepper.plan, batch_size(state.carry, x))
        check_same(state.traces, shapes, "the state's traces", checks.STATE_REMEDY)
        check_same(state.pending.update, stepper.update, "the state's pending update", checks.STATE_REMEDY)
        return stepper

    @documented_by(contract.Init)
    def init(self, params: PyTree, carry: PyTree, x: PyTree, key: jax.Array | None = None) -> LearnerState:
        if key is not None:
            raise ValueError("deep_eprop draws nothing at random; leave out key.")
        given, carry, x = _arrays(params=params, carry=carry, x=x)
        params, carry, x = vary_alike(given, carry, x)
        stepper, batch = self._planner.once(stepper_of, params, carry, x), batch_size(carry, x)
        traces = first_traces(stepper.plan, batch)
        update = stepper.first_update(given, params, carry)
        pending = Pending(own_copy(carry), own_copy(x), update, jnp.zeros(batch, bool))
        return _vary(LearnerState(own_copy(carry), traces, pending, own_copy(carry)), traces, False, params, carry, x)

    @documented_by(contract.Step)
    def step(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        given, before, x = _arrays(params=params, state=state, x=x)
        params, state, x = vary_alike(given, before, x)
        stepper = self._stepper_for(params, state, x)
        traces = stepper.advance(state)
        carry_t, y_t, now = stepper.run(params, state.carry, x)
        update = stepper.update_of(now, given, before, x)
        pending = Pending(state.carry, own_copy(x), update, jnp.ones_like(state.pending.active))
        new = checks.next_state(LearnerState(carry_t, traces, pending, state.initial_carry), state)
        return _vary(new, before.traces, stepper.projects(before.pending.update), params), vary_like(y_t, params)

    @documented_by(contract.Gradient)
    def gradient(
        self,
        params: PyTree,
        state: LearnerState,
        dy: PyTree,
        signals: Mapping[str, PyTree] | None = None,
        per_example: bool = False,
    ) -> PyTree:
        checks.check_flag("per_example", per_example)
        given, state = _arrays(params=params, state=state)
        params, state, dy, signals = vary_alike(given, state, dy, signals)
        stepper = self._stepper_for(params, state, state.pending.x)
        plan = stepper.plan
        active = state.pending.active
        if not isinstance(active, jax.core.Tracer) and not active.any():
            raise ValueError("No step is pending in this state. Call learner.step first, then learner.gradient.")
        dy = keep_examples(active, checks.check_cotangent(dy, batched_output(plan, active.shape[0])))
        values = by_index(plan, signals).items()
        own = {v: keep_examples(active, shaped(plan, v, signal, active.shape[0])) for v, signal in values}

        def of(state: LearnerState, dy: PyTree, own: Given) -> list[list[jax.Array]]:
            return stepper.gradient(stepper.last(params, state), state.traces, dy, own)

        axes = batch_axes(self._graph, state)
        found = of_each_example(of, axes, state, dy, own) if per_example else of(state, dy, own)
        if not (per_example and varying_axes(active)):  # parts of a split batch are not compared, which would be a sum
            there = any_anywhere(active)
            found = [[jnp.where(there, leaf, jnp.nan) for leaf in leaves] for leaves in found]
        return jax.vmap(partial(as_params, plan))(found) if per_example else summed_like(as_params(plan, found), given)

    @documented_by(contract.ValueAndGrad)
    def value_and_grad(
        self,
        loss_fn: Callable[..., PyTree],
        *,
        segment_length: int | None = None,
        within_segment: str = "eprop",
        has_aux: bool = False,
        signals: Mapping[str, Signal] | None = None,
        window: int | None = None,
    ) -> Callable[..., PyTree]:
        checks.check_sequence_options(loss_fn, segment_length, within_segment, window)
        exact = within_segment == "exact"

        @documented_by(contract.RunSequence)
        def run(params, state, xs, targets, resets=None, valid=None):
            given, state, xs = _arrays(params=params, state=state, xs=xs)
            steps = checks.sequence_length(xs, targets)
            before = state
            params, state, xs, targets, resets, valid = vary_alike(given, state, xs, targets, resets, valid)
            stepper = self._stepper_for(params, state, jax.tree.map(lambda leaf: leaf[0], xs))
            plan, pending = stepper.plan, state.pending
            own = by_index(plan, signals)
            check_functions(own)
            initial = state.initial_carry
            sequence = make_sequence(plan, loss_fn, has_aux, initial, xs, targets, resets, valid, own, window)
            length = window or segment_length or choose_length(plan, pending.active.shape[0], steps).steps
            start = Stream(state.carry, before_sequence(stepper, state))
            (loss, end), grads = by_segments(params, start, sequence, length, exact)
            update = stepper.after_sequence(before.pending.update, end.carry)
            pending = pending._replace(active=jnp.zeros_like(pending.active), update=update)
            new = checks.next_state(LearnerState(end.carry, end.traces, pending, initial), state)
            return (loss, _vary(new, before.traces, True, params)), summed_like(grads, given)

        return run

    @documented_by(contract.Reset)
    def reset(self, state: LearnerState, where: jax.Array) -> LearnerState:
        (state,) = _arrays(state=state)
        checks.check_state(self._graph, state)
        where = checks.check_flags(where, state.pending.active.shape, "where")
        before, update = state, state.pending.update
        if isinstance(update, Window):
            update = without_examples(update, where, state.initial_carry)
        state, where = vary_alike(state, where)
        traces = reset_traces(where, state.traces)
        # ``gradient`` gives such an example zero, but zero times a number that is not finite would be none.
        carry = select_examples(where, state.initial_carry, state.pending.carry)
        x = select_examples(where, jax.tree.map(_finite, state.pending.x), state.pending.x)
        pending = Pending(carry, x, update, state.pending.active & ~where)
        carry = select_examples(where, state.initial_carry, state.carry)
        return _vary(LearnerState(carry, traces, pending, state.initial_carry), before.traces, False)

    def plan(self, params: PyTree, carry: PyTree, x: PyTree) -> Plan:
        """What was found out about the network, for arrays or for shapes; made once per shapes and kept."""
        named = {"params": params, "carry": carry, "x": x}
        return self._planner.plan(*(as_avals(tree, what) for what, tree in named.items()))


def _arrays(**named: PyTree) -> list[PyTree]:
    """The arguments with strongly typed arrays as leaves."""
    return [as_arrays(tree, what) for what, tree in named.items()]


def _vary(state: LearnerState, before: Traces, projected: jax.Array | bool, *others: PyTree) -> LearnerState:
    """See ``mesh_axes.vary_like``; what waits for the next step may be params, which need not vary, nor does a basis.

    Args:
      before: the traces from which those of the state came; ``projected`` if through a projection.
    """
    moved, update = vary_like(state, *others), state.pending.update
    traces = moved.traces
    if NAME in traces:
        traces = traces | {NAME: traces[NAME].in_basis_of(before[NAME], projected)}
    return moved._replace(pending=moved.pending._replace(update=update), traces=traces)


def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(leaf), leaf, 0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
