"""The paper's recursion, one step at a time, on the lattice of time (right) and depth (up).

    S^{v,k}_t = ∂F/∂h S^{v,k}_{t-1} + ∂F/∂u U^{v,k}_t + [v = k] ∂F/∂θ                                  eq. 9, 10
    Y^{v,k}_t = ∂g/∂h_t S^{v,k}_t + ∂g/∂h_{t-1} S^{v,k}_{t-1} + ∂g/∂u U^{v,k}_t + [v = k] ∂g/∂θ
    U^{v,k}_t = Σ_p ∂u^v_t/∂y^p_t Y^{p,k}_t, over v's parents p                                        eq. 11

S^{v,k} is the influence of node k's parameters on node v's carry, Y^{v,k} on its output, and U^{v,k} on its input. With
exact=False ∂F/∂h, in S, is cut to its unit-local blocks D (eq. 6); ∂g/∂h is not. A pair (v, k) is kept (S^{v,k} is
stored), or only passed on (something above needs Y^{v,k}, without a past), or both.
Over C steps, ``influence`` pulls unit vectors down instead; for one step, and dense cells, going up takes a third of
the time. (B. Millidge, "Generalizing E-prop to Deep Networks", arXiv:2512.24506.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node
from deepeprop_jax.jaxpr.computed_once import computed_once
from deepeprop_jax.jaxpr.real_leaves import PyTree, float32_or_wider
from deepeprop_jax.network.cell import connect, parents
from deepeprop_jax.segments import single_step
from deepeprop_jax.segments.depth import DeepSegment
from deepeprop_jax.segments.depth_upward import update_layers, wanted_of
from deepeprop_jax.segments.network import Segment
from deepeprop_jax.segments.partials import (
    KeptInfluence,
    Partials,
    Wanted,
    cross_influence,
    own_influence,
    own_output,
    partials,
)
from deepeprop_jax.traces.block import Rows
from deepeprop_jax.traces.depth import DeepTraces
from deepeprop_jax.traces.joint_rows import joint
from deepeprop_jax.traces.output_influence import Influence
from deepeprop_jax.traces.plan import Plan, Traces


def applies(plan: Plan) -> bool:
    """Whether single steps move their traces in this way."""
    return plan.rank is None and plan.projection is None and not plan.filtered and not single_step.applies(plan)


def update(step: Segment, traces_tm1: Traces) -> Traces:
    """All traces one step on: S_{t-1} -> S_t, node by node upward.

    Args:
      step: a segment of one step.
    """
    plan = step.plan
    traces: Traces = {}
    outputs: dict[tuple[int, int], Influence] = {}  # Y^{p,k}_t
    for v, part in enumerate(step.nodes):
        from_below = {k: _input_influence(step, v, k, outputs) for k in plan.sources(v)}
        names = {k: plan.name(v, k) for k in from_below if (v, k) in plan.pairs}
        own_name = plan.name(v, v)
        if isinstance(part, DeepSegment):
            deep_tm1 = traces_tm1.get(own_name, DeepTraces((), None))
            cross_tm1 = {k: traces_tm1[name] for k, name in names.items()}
            if own_name in traces_tm1 or from_below or (v, v) in plan.transmitted:
                own_deep, cross_t, above = update_layers(plan, v, part, deep_tm1, cross_tm1, from_below)
                traces |= {own_name: own_deep} if own_name in traces_tm1 else {}
                traces |= {names[k]: trace for k, trace in cross_t.items()}
                outputs |= {(v, k): y for k, y in above.items()}
            continue
        wanted = wanted_of(plan, v)
        if not (wanted.own or wanted.input or wanted.own_output):
            continue
        partial = partials(part, wanted, plan.dtype)
        own_tm1 = traces_tm1.get(own_name, ())
        if wanted.own_output:
            own_t, outputs[v, v] = _own_upward(part.node, partial, wanted, own_tm1)
        else:
            own_t = own_influence(part.node, partial, wanted.own, own_tm1)
        if own_t:
            traces[own_name] = own_t
        for k, arriving in from_below.items():
            past = KeptInfluence(traces_tm1[names[k]]) if k in names else None
            trace_t, output = cross_influence(part.node, partial, past, arriving, (v, k) in plan.transmitted)
            if k in names:
                traces[names[k]] = trace_t
            if output is not None:
                outputs[v, k] = output
    return traces


def _own_upward(
    node: Node, partial: Partials, wanted: Wanted, own_tm1: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], Influence]:
    """S^{k,k}_t and Y^{k,k}_t, all local rows as one array."""
    blocks, join = wanted.own, joint(wanted.own)
    wanted, partial = wanted._replace(own=join.blocks), partial._replace(own=join.join(partial.own))
    past = join.join(own_tm1)
    now = own_influence(node, partial, wanted.own, past)
    # Local rows are read again for every row of the layers above.
    now = tuple(computed_once(s) if b.kind is Rows.LOCAL else s for b, s in zip(wanted.own, now, strict=True))
    return join.split(now, blocks), own_output(node, partial, wanted, past, now)


def _input_influence(step: Segment, v: int, k: int, outputs: dict[tuple[int, int], Influence]) -> Influence:
    """U^{v,k} = Σ_p ∂u^v/∂y^p Y^{p,k}, over v's parents p: their Y, placed into v's input (eq. 11)."""
    plan = step.plan
    wire, view = plan.graph.nodes[v].wire, plan.nodes[v].input
    if isinstance(wire, int):
        return outputs[wire, k]
    influence = Influence(plan.nodes[k], plan.trained[k])
    x, nothing = _wide_zeros(step.one_input, plan.dtype), _wide_zeros(step.one_outputs, plan.dtype)
    for p in parents(wire):
        if (p, k) not in outputs:
            continue

        def place(column: jax.Array, p: int = p) -> jax.Array:
            """connect() is linear, so it places one column of an influence as it places a value."""
            output = plan.nodes[p].output
            value = output.join(output.unflatten(column), output.split(nothing[p]).other)
            placed = connect(wire, x, nothing | {p: value})
            return view.flatten([leaf.astype(plan.dtype) for leaf in view.split(placed).real])

        columns = jax.vmap(place, in_axes=-1, out_axes=-1)
        influence = influence.plus(outputs[p, k].map(jax.vmap(columns)))
    return influence


def _wide_zeros(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """Zeros, in the traces' dtype where a leaf is real or complex; a key stays as it is."""

    def zeros(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return jnp.zeros(leaf.shape, float32_or_wider(np.dtype(np.complex64), dtype))
        return jnp.zeros(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

    return jax.tree.map(zeros, tree)
