"""A node's eligibility trace, to look at: what its carry owes to each of its own parameters so far."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner
from deepeprop_jax.learner.stepper import stepper_of
from deepeprop_jax.network.arguments import as_avals
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.low_rank import multiplied_out
from deepeprop_jax.traces.plan import Plan


def eligibility(
    learner: OnlineLearner, params: PyTree, state: LearnerState, node: str, parameter: str
) -> dict[str, jax.Array]:
    """The eligibility trace of a parameter: dh/dθ of its own node, after the last step (Bellec et al. 2020).

    A gradient is a learning signal times this: for a loss that reads the node's carry h once, now, it is
    Σ ∂L/∂h · dh/dθ.

    Args:
      learner, params, state: as for ``learner.gradient``; the last step is in the trace, though it waits in the state.
      node: its name, as in ``learner.network.graph.nodes``; a cell alone is "cell".
      parameter: path of a leaf in the node's params, such as "params/hn/kernel", "value" where they are one array; with
        ``.real`` or ``.imag`` behind it where it is complex.

    Returns:
      Per real carry leaf of the node, by its path ("0" for the first of a tuple, "value" where the carry is one array),
      in the traces' dtype:

      * local rows, where an entry reaches one unit alone: ``(batch, *shape of the parameter)``, the influence on that
        unit's number in this leaf;
      * dense rows: ``(batch, *shape of the carry leaf, *shape of the parameter)``.

      With an axis of layers in front for a ``stack(cell, depth=L)``. Leaves that have no trace, because they are
      functions of others, as a spike is of its potential, and leaves that the parameter does not reach, are not in it.

    Raises:
      ValueError: an unknown node or parameter; one without a trace; a projected carry without ``own_traces``.

    >>> import flax.linen as nn
    >>> from deepeprop_jax import deep_eprop
    >>> learner = deep_eprop(nn.LSTMCell(features=4))
    >>> x = jnp.ones((2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), x)
    >>> state, _ = learner.step(params, learner.init(params, carry, x), x)
    >>> found = eligibility(learner, params, state, "cell", "params/hi/kernel")
    >>> {name: trace.shape for name, trace in found.items()}
    {'0': (2, 4, 4), '1': (2, 4, 4)}
    """
    given = {"params": params, "carry": state.carry, "x": state.pending.x}
    avals = [as_avals(tree, what) for what, tree in given.items()]
    plan = learner.plan(*avals)
    v, i = _place(plan, node, parameter)
    if plan.projection is not None and not any(plan.own):
        raise ValueError("A projected carry keeps no trace of a node; make the learner with own_traces=True.")
    traces = stepper_of(plan, *avals).advance(state)
    has_depth, layout = plan.graph.nodes[v].depth is not None, plan.low_rank[v]
    held = traces.get(plan.name(v, v), ())
    pairs = list(zip(plan.own[v], held.own if has_depth else held, strict=True))
    if layout is not None:
        out = partial(multiplied_out, layout)
        out = jax.vmap(out) if has_depth else out
        pairs += zip(layout.blocks, out(traces[plan.low_rank_name(v)]), strict=True)
    for block, trace in pairs:
        if i in block.leaves:
            return _by_leaf(plan.nodes[v], block, i, trace)
    raise ValueError(f"{parameter!r} of node {node!r} has no trace: it is masked, or reaches no carry.")


def _place(plan: Plan, node: str, parameter: str) -> tuple[int, int]:
    known = [vertex.name for vertex in plan.graph.nodes]
    if node not in known:
        raise ValueError(f"There is no node {node!r}; the network's nodes are {known}.")
    v = known.index(node)
    names = plan.nodes[v].params.names
    if parameter not in names:
        raise ValueError(f"Node {node!r} has no parameter {parameter!r}; its parameters are {names}.")
    return v, names.index(parameter)


def _by_leaf(node: Node, block: Block, i: int, trace: jax.Array) -> dict[str, jax.Array]:
    """A block's rows for one parameter leaf, by carry leaf: (..., batch, rows, columns) each in its shape."""
    start = sum(node.params.sizes[leaf] for leaf in block.leaves[: block.leaves.index(i)])
    own, shape = trace[..., start : start + node.params.sizes[i]], node.params.shapes[i]
    found = {}
    ends = np.cumsum([0, *node.carry.sizes])
    for leaf, name in enumerate(node.carry.names):
        components = slice(int(ends[leaf]), int(ends[leaf + 1]))
        if block.kind is Rows.DENSE:
            found[name] = own[..., components, :].reshape(*own.shape[:-2], *node.carry.shapes[leaf], *shape)
            continue
        assert block.unit is not None
        reached = np.isin(block.unit.ravel(), node.units.unit[components])
        if reached.any():
            slot = int(node.units.slot[components][0])
            found[name] = jnp.where(reached, own[..., slot, :], 0).reshape(*own.shape[:-2], *shape)
    return found
