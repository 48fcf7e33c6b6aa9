"""What all rules share: a rule that is given for one step of one example, as a learner that runs step after step.

    gradient   =  sum over examples of  rule.gradient(memory_tm1, memory_t, dL_t/dy_t)
    memory_t   =  rule.move(memory_tm1)

The state is a ``LearnerState``: ``traces`` holds the memory before the last step, ``pending.update`` the one after it,
which takes its place at the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.real_leaves import RealView, select_examples
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, Pending
from deepeprop_jax.learner.layout import with_layouts
from deepeprop_jax.learner.planner import Planner
from deepeprop_jax.learner.sequence import keep_examples, make_sequence
from deepeprop_jax.network.arguments import as_arrays, as_avals, batch_size, check_same
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import Cell, PyTree, graph_of, remade
from deepeprop_jax.rules.flat import cotangent, leaves, number_type
from deepeprop_jax.traces.plan import Mode, Plan

REMEDY = "Make the state with this learner's init, for these params and this batch size."


class Recursion(NamedTuple):
    """What a rule keeps, and what it makes of it, for one example.

    ``plan`` says what was found out about the network, ``params`` are all parameters.

    Attributes:
      first: ``first(plan, params, carry, x) -> memory`` at the start: zeros.
      move: ``move(plan, params, carry_tm1, x, memory_tm1, key) -> memory_t``; key is None for a rule without draws.
      gradient: ``gradient(plan, params, carry_tm1, x, memory_tm1, memory_t, dy) -> g``: what the step's loss
        contributes, by each real number of params in turn; dy is a vector of the output's real numbers.
      draws: whether ``move`` draws random numbers.
    """

    first: Callable[[Plan, PyTree, PyTree, PyTree], PyTree]
    move: Callable[[Plan, PyTree, PyTree, PyTree, PyTree, jax.Array | None], PyTree]
    gradient: Callable[[Plan, PyTree, PyTree, PyTree, PyTree, PyTree, jax.Array], jax.Array]
    draws: bool = False


class Memory(NamedTuple):
    """What a stream keeps of every example beside its carry.

    Attributes:
      numbers: the rule's own, (batch, ...).
      keys: (batch,), of the draws to come; None for a rule without draws. A reset leaves them: draws never repeat.
    """

    numbers: PyTree
    keys: jax.Array | None


class Made(NamedTuple):
    """A network, a rule, and the plans that are kept."""

    cell: Cell
    rule: Recursion
    name: str
    planner: Planner


def by_steps(
    network: object, rule_of: Callable[[Cell], Recursion], factory: Callable[..., OnlineLearner], **options: Any
) -> OnlineLearner:
    """A rule as a learner, with the contract of ``deep_eprop``.

    Args:
      rule_of: the rule of a network.
      factory, options: the call that makes the learner, by which it pickles.
    """
    cell = as_cell(network)
    name = factory.__name__
    made = Made(cell, rule_of(cell), name, Planner(graph_of(cell), Mode(hops=0)))

    def init(params: PyTree, carry: PyTree, x: PyTree, key: jax.Array | None = None) -> LearnerState:
        return _init(made, params, carry, x, key)

    def step(params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        return _step(made, params, state, x)

    def gradient(
        params: PyTree,
        state: LearnerState,
        dy: PyTree,
        signals: Mapping[str, PyTree] | None = None,
        per_example: bool = False,
    ) -> PyTree:
        _refuse_signals(name, signals)
        checks.check_flag("per_example", per_example)
        return _gradient(made, params, state, dy, per_example)

    def value_and_grad(
        loss_fn: Callable[..., PyTree],
        *,
        segment_length: int | None = None,
        within_segment: str = "eprop",
        has_aux: bool = False,
        signals: Mapping[str, Callable[..., PyTree]] | None = None,
        window: int | None = None,
    ) -> Callable[..., PyTree]:
        _refuse_signals(name, signals)
        checks.check_sequence_options(loss_fn, segment_length, within_segment, window)
        if segment_length not in (None, 1) or within_segment != "eprop" or window is not None:
            raise ValueError(
                f"{name} goes step by step, without segments; leave out segment_length, within_segment, window."
            )

        def run(params, state, xs, targets, resets=None, valid=None):
            return _run(made, loss_fn, has_aux, params, state, xs, targets, resets, valid)

        return run

    def reset(state: LearnerState, where: jax.Array) -> LearnerState:
        return _reset(made, state, where)

    def plan(params: PyTree, carry: PyTree, x: PyTree) -> Plan:
        named = {"params": params, "carry": carry, "x": x}
        return made.planner.plan(*(as_avals(tree, what) for what, tree in named.items()))

    learner = OnlineLearner(init, step, gradient, with_layouts(value_and_grad), reset, cell, plan)
    return remade(learner, factory, cell, **options)


def _refuse_signals(name: str, signals: object) -> None:
    if signals:
        raise ValueError(f"{name} makes its own signals; leave out signals, or use deep_eprop(network, signals=...).")


def _init(made: Made, params: PyTree, carry: PyTree, x: PyTree, key: jax.Array | None) -> LearnerState:
    params, carry, x = as_arrays(params, "params"), as_arrays(carry, "carry"), as_arrays(x, "x")
    if key is not None and not made.rule.draws:
        raise ValueError(f"{made.name} draws nothing at random; leave out key.")
    batch = batch_size(carry, x)
    plan = made.planner.plan(params, carry, x)
    zeros = _first(made, plan, params, carry, x)
    seed = jax.random.key(0) if key is None else key
    traces = {made.name: Memory(zeros, jax.random.split(seed, batch) if made.rule.draws else None)}
    pending = Pending(_copy(carry), _copy(x), _copy(traces), jnp.zeros(batch, bool))
    return LearnerState(_copy(carry), traces, pending, _copy(carry))


def _copy(tree: PyTree) -> PyTree:
    """Buffers of the state's own, so that it may be donated."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _first(made: Made, plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
    return jax.vmap(lambda carry, x: made.rule.first(plan, params, carry, x))(carry, x)


def _checked(made: Made, params: PyTree, state: LearnerState, x: PyTree) -> Plan:
    """The plan for a state, which must be one of this rule's."""
    if not isinstance(state, LearnerState):
        raise TypeError(f"state must be what learner.init or learner.step returned; seen {type(state).__name__}.")
    checks.check_step_input(x, state.pending.x)
    plan = made.planner.plan(params, state.carry, x)
    zeros = jax.eval_shape(lambda: _first(made, plan, params, state.carry, x))
    needed = {made.name: Memory(zeros, _keys_of(state) if made.rule.draws else None)}
    for what, traces in (("traces", state.traces), ("pending update", state.pending.update)):
        check_same(traces, needed, f"the state's {what}", REMEDY)
    return plan


def _keys_of(state: LearnerState) -> jax.ShapeDtypeStruct:
    batch = state.pending.active.shape
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))


def _moved(made: Made, plan: Plan, params: PyTree, carry: PyTree, x: PyTree, memory: Memory) -> Memory:
    """The memory after a step, of every example."""
    keys = after = None
    if memory.keys is not None:
        keys, after = jax.vmap(jax.random.split, out_axes=1)(memory.keys)

    def one(carry: PyTree, x: PyTree, numbers: PyTree, key: jax.Array | None) -> PyTree:
        return made.rule.move(plan, params, carry, x, numbers, key)

    return Memory(jax.vmap(one)(carry, x, memory.numbers, keys), after)


def _found(
    made: Made, plan: Plan, params: PyTree, carry: PyTree, x: PyTree, before: Memory, after: Memory, dy: PyTree
) -> jax.Array:
    """The gradient of a step's loss, by every real number of params: (batch, |θ|), each example's part."""
    dtype = number_type(params, carry)

    def one(carry: PyTree, x: PyTree, before: PyTree, after: PyTree, dy: PyTree) -> jax.Array:
        d = cotangent(dy, plan.output_avals, dtype)
        return made.rule.gradient(plan, params, carry, x, before, after, d)

    return jax.vmap(one)(carry, x, before.numbers, after.numbers, dy)


def _as_params(params: PyTree, gradient: jax.Array) -> PyTree:
    view = RealView(params)
    return view.join_gradient(leaves(view, gradient))


def _apply(made: Made, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    return jax.vmap(made.cell.apply, in_axes=(None, 0, 0))(params, carry, x)


def _step(made: Made, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
    params, state, x = as_arrays(params, "params"), as_arrays(state, "state"), as_arrays(x, "x")
    plan = _checked(made, params, state, x)
    before = state.pending.update
    after = {made.name: _moved(made, plan, params, state.carry, x, before[made.name])}
    carry_t, y_t = _apply(made, params, state.carry, x)
    pending = Pending(state.carry, _copy(x), after, jnp.ones_like(state.pending.active))
    return checks.next_state(LearnerState(carry_t, before, pending, state.initial_carry), state), y_t


def _gradient(made: Made, params: PyTree, state: LearnerState, dy: PyTree, per_example: bool) -> PyTree:
    params, state = as_arrays(params, "params"), as_arrays(state, "state")
    carry, x, update, active = state.pending
    plan = _checked(made, params, state, x)
    if not isinstance(active, jax.core.Tracer) and not active.any():
        raise ValueError("No step is pending in this state. Call learner.step first, then learner.gradient.")
    y_t = jax.eval_shape(lambda: _apply(made, params, carry, x)[1])
    dy = keep_examples(active, checks.check_cotangent(dy, y_t))
    found = _found(made, plan, params, carry, x, state.traces[made.name], update[made.name], dy)
    found = jnp.where(active.any(), found, jnp.nan)
    return jax.vmap(partial(_as_params, params))(found) if per_example else _as_params(params, found.sum(0))


def _run(made: Made, loss_fn, has_aux: bool, params, state, xs, targets, resets, valid) -> tuple:
    params, state, xs = as_arrays(params, "params"), as_arrays(state, "state"), as_arrays(xs, "xs")
    checks.sequence_length(xs, targets)
    plan = _checked(made, params, state, jax.tree.map(lambda leaf: leaf[0], xs))
    initial = state.initial_carry
    sequence = make_sequence(plan, loss_fn, has_aux, initial, xs, targets, resets, valid)

    def step(so_far: tuple, at: tuple) -> tuple:
        (carry, memory, grads, total), (x, target, flags) = so_far, at
        if flags.resets is not None:
            carry, memory = select_examples(flags.resets, initial, carry), _restarted(flags.resets, memory)
        carry_t, y_t = _apply(made, params, carry, x)
        (loss, aux), dy = sequence.loss_and_dy(y_t, target, flags.valid)
        after = _moved(made, plan, params, carry, x, memory)
        grads = grads + _found(made, plan, params, carry, x, memory, after, dy).sum(0)
        if flags.valid is not None:
            carry_t, after = select_examples(flags.valid, (carry_t, after), (carry, memory))
        return (carry_t, after, grads, total + loss), aux

    zeros = jnp.zeros(RealView(params).size, number_type(params, initial)), jnp.zeros((), sequence.loss_dtype)
    start = (state.carry, state.pending.update[made.name], *zeros)
    (carry, memory, grads, total), aux = jax.lax.scan(step, start, sequence.inputs)
    traces = {made.name: memory}
    pending = state.pending._replace(update=traces, active=jnp.zeros_like(state.pending.active))
    new = checks.next_state(LearnerState(carry, traces, pending, initial), state)
    return ((total, aux) if has_aux else total, new), _as_params(params, grads)


def _restarted(where: jax.Array, memory: Memory) -> Memory:
    """Zeros where an example begins anew."""
    return memory._replace(numbers=select_examples(where, jax.tree.map(jnp.zeros_like, memory.numbers), memory.numbers))


def _reset(made: Made, state: LearnerState, where: jax.Array) -> LearnerState:
    if not isinstance(state, LearnerState):
        raise TypeError(f"state must be what learner.init or learner.step returned; seen {type(state).__name__}.")
    state = as_arrays(state, "state")
    where = checks.check_flags(where, state.pending.active.shape, "where")
    before, after = (
        {made.name: _restarted(where, traces[made.name])} for traces in (state.traces, state.pending.update)
    )
    # An input of numbers that are not finite is not run again.
    x = select_examples(where, jax.tree.map(_without_numbers, state.pending.x), state.pending.x)
    pending = Pending(
        select_examples(where, state.initial_carry, state.pending.carry), x, after, state.pending.active & ~where
    )
    carry = select_examples(where, state.initial_carry, state.carry)
    return LearnerState(carry, before, pending, state.initial_carry)


def _without_numbers(leaf: jax.Array) -> jax.Array:
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
