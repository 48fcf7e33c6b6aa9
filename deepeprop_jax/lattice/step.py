"""The paper's recursion, one step at a time, on the lattice of time (right) and depth (up).

    S^{v,k}_t = dF/dh S^{v,k}_{t-1} + dF/du U^{v,k}_t + [v = k] dF/dtheta                               eq. 9 to 11
    Y^{v,k}_t = dg/dh_t S^{v,k}_t + dg/dh_{t-1} S^{v,k}_{t-1} + dg/du U^{v,k}_t + [v = k] dg/dtheta
    grad^k_t  = inst^k + sum over kept (v, k) of lambda^v_{t-1} . S^{v,k}_{t-1}

S^{v,k} is the influence of node k's parameters on node v's carry, Y^{v,k} on its output, and U^{v,k} the Y^{p,k} of v's
parents p, placed into v's input. lambda^v_{t-1} is the cotangent of v's incoming carry under this step's loss, from one
reverse pass inside the step, which also gives inst^k. With exact=False dF/dh stands for its unit-local blocks D, in all
three lines. (B. Millidge, "Generalizing E-prop to Deep Networks", arXiv:2512.24506.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.analysis.node import Node, Reals
from deepeprop_jax.jaxpr.real_leaves import RealView, float32_or_wider
from deepeprop_jax.lattice import depth as deep
from deepeprop_jax.lattice import layer as one
from deepeprop_jax.lattice.depth import wanted_of
from deepeprop_jax.lattice.joint_rows import joint
from deepeprop_jax.lattice.layer import LayerGradient, Moment, Partials, Past, Wanted
from deepeprop_jax.lattice.output_influence import Influence
from deepeprop_jax.network.cell import PyTree, assemble, connect, parents, select
from deepeprop_jax.traces.block import Rows, add_columns
from deepeprop_jax.traces.depth import DeepTraces, own_gradient_of_layers
from deepeprop_jax.traces.kinds import contract
from deepeprop_jax.traces.local import computed_once
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.state import Traces, cross_gradient


class Moments(NamedTuple):
    """What every node saw in one step.

    Attributes:
      nodes: per node.
      x: the external input.
      outputs: per node, its output.
    """

    nodes: list[Moment]
    x: PyTree
    outputs: list[PyTree]


def forward(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree) -> tuple[PyTree, PyTree, Moments]:
    """Run all nodes for one step: (carry_t, output of the network, moments)."""
    outputs: dict[int, PyTree] = {}
    carries, moments = [], []
    for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        u = connect(vertex.wire, x, outputs)
        arguments = (node, select(params, vertex.path), select(carry_tm1, vertex.path), u)
        if vertex.depth is None:
            carry_t, outputs[v], moment = one.forward(*arguments)
        else:
            carry_t, outputs[v], moment = deep.forward(*arguments, vertex.depth)
        carries.append(carry_t)
        moments.append(moment)
    y = connect(plan.graph.output, x, outputs)
    return assemble(plan.graph, carries), y, Moments(moments, x, [outputs[v] for v in range(len(moments))])


def local_blocks(plan: Plan, moments: Moments) -> list[jax.Array | None]:
    """D of every node whose recurrence enters by its unit-local blocks; None for the others."""
    found: list[jax.Array | None] = []
    for v, moment in enumerate(moments.nodes):
        node = plan.nodes[v]
        if not node.recurrent or plan.full_jacobian(v):
            found.append(None)
        else:
            module = one if plan.graph.nodes[v].depth is None else deep
            # In the traces' dtype: products of many D in bfloat16 would lose what a trace remembers.
            D = module.local_blocks(node, moment).astype(plan.dtype)
            found.append(computed_once(D))
    return found


def reverse(plan: Plan, moments: Moments, blocks: list[jax.Array | None], dy: PyTree) -> list[LayerGradient]:
    """One reverse pass inside the step: instantaneous gradients, and the cotangent of every incoming carry.

    Args:
      dy: cotangent of the network's output, in ``jax.grad``'s convention.
    """
    reals = [node.output.split(y).real for node, y in zip(plan.nodes, moments.outputs, strict=True)]
    cotangents = [[jnp.zeros_like(leaf) for leaf in real] for real in reals]

    def give(wire: Any, view: Any, du: Reals) -> None:
        """Hand the cotangent of what a wire carries to the outputs that it is made of."""
        sources = parents(wire)

        def carried(real: dict[int, Reals]) -> Reals:
            outputs = {p: plan.nodes[p].output.join(real[p], _others(plan, moments, p)) for p in sources}
            return view.split(connect(wire, moments.x, outputs)).real

        if sources:
            values, pull = jax.vjp(carried, {p: reals[p] for p in sources})
            (found,) = pull([d.astype(value.dtype) for d, value in zip(du, values, strict=True)])
            for p in sources:
                cotangents[p] = jax.tree.map(jnp.add, cotangents[p], found[p])

    give(plan.graph.output, plan.output, plan.output.split_cotangent(dy))
    gradients: list[LayerGradient] = []
    for v in reversed(range(len(plan.nodes))):
        node, vertex = plan.nodes[v], plan.graph.nodes[v]
        module = one if vertex.depth is None else deep
        # Where D is the whole of dF/dh, the VJP of F does the same without it.
        block = None if node.elementwise else blocks[v]
        gradient = module.reverse(node, moments.nodes[v], block, cotangents[v])
        give(vertex.wire, node.input, gradient.input)
        gradients.append(gradient)
    return gradients[::-1]


def _others(plan: Plan, moments: Moments, p: int) -> list[jax.Array]:
    return plan.nodes[p].output.split(moments.outputs[p]).other


def gradient(
    plan: Plan, moments: Moments, blocks: list[jax.Array | None], traces_tm1: Traces, dy: PyTree
) -> list[Reals]:
    """This step's gradient of every real parameter leaf, summed over the batch, in the traces' dtype.

    grad^k_t = inst^k + sum over kept (v, k) of lambda^v_{t-1} . S^{v,k}_{t-1}
    """
    inside = reverse(plan, moments, blocks, dy)
    found: list[Reals] = []
    for k, node in enumerate(plan.nodes):
        grads = [leaf.astype(plan.dtype) for leaf in inside[k].params]
        columns = _own_gradient(plan, k, inside[k].carry, traces_tm1, grads)
        for v, source in plan.pairs:
            if source == k:
                part = cross_gradient(plan, v, k, inside[v].carry, traces_tm1)
                columns = part if columns is None else columns + part
        if columns is not None:
            add_columns(node.params, grads, plan.trained[k], columns)
        found.append([grad if i in plan.trained[k] else jnp.zeros_like(grad) for i, grad in enumerate(grads)])
    return found


def _own_gradient(plan: Plan, k: int, cotangent: jax.Array | None, traces: Traces, grads: Reals) -> jax.Array | None:
    """Add lambda^k . S^{k,k} to ``grads``; of a node with depth, return it as (L, columns)."""
    if plan.name(k, k) not in traces or cotangent is None:
        return None
    if plan.graph.nodes[k].depth is not None:
        return own_gradient_of_layers(plan, k, cotangent, traces)
    node = plan.nodes[k]
    for block, trace in zip(plan.own[k], traces[plan.name(k, k)], strict=True):
        add_columns(node.params, grads, block.leaves, contract(node, block, cotangent, trace))
    return None


def update(plan: Plan, moments: Moments, blocks: list[jax.Array | None], traces_tm1: Traces) -> Traces:
    """All traces one step on: S_{t-1} -> S_t, node by node upward."""
    traces: Traces = {}
    outputs: dict[tuple[int, int], Influence] = {}  # Y^{p,k}_t
    for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        from_below = {k: _input_influence(plan, moments, v, k, outputs) for k in plan.sources(v)}
        names = {k: plan.name(v, k) for k in from_below if (v, k) in plan.pairs}
        moment, own_name = moments.nodes[v], plan.name(v, v)
        if vertex.depth is not None:
            deep_tm1 = traces_tm1.get(own_name, DeepTraces((), None))
            cross_tm1 = {k: traces_tm1[name] for k, name in names.items()}
            if own_name in traces_tm1 or from_below or (v, v) in plan.transmitted:
                own_deep, cross_t, above = deep.update(plan, v, moment, blocks[v], deep_tm1, cross_tm1, from_below)
                traces |= {own_name: own_deep} if own_name in traces_tm1 else {}
                traces |= {names[k]: trace for k, trace in cross_t.items()}
                outputs |= {(v, k): y for k, y in above.items()}
            continue
        wanted = wanted_of(plan, v)
        if not (wanted.own or wanted.input or wanted.own_output):
            continue
        partial = one.partials(node, moment, blocks[v], wanted, plan.dtype)
        own_tm1 = traces_tm1.get(own_name, ())
        if wanted.own_output:
            own_t, outputs[v, v] = _own_upward(node, partial, wanted, own_tm1)
        else:
            own_t = one.own_influence(node, partial, wanted.own, own_tm1)
        if own_t:
            traces[own_name] = own_t
        for k, influence in from_below.items():
            past = Past(traces_tm1[names[k]]) if k in names else None
            trace_t, output = one.cross_influence(node, partial, past, influence, (v, k) in plan.transmitted)
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
    now = one.own_influence(node, partial, wanted.own, past)
    # Local rows are read again for every row of the layers above.
    now = tuple(computed_once(s) if b.kind is Rows.LOCAL else s for b, s in zip(wanted.own, now, strict=True))
    return join.split(now, blocks), one.own_output(node, partial, wanted, past, now)


def _input_influence(
    plan: Plan, moments: Moments, v: int, k: int, outputs: dict[tuple[int, int], Influence]
) -> Influence:
    """U^{v,k}: the Y^{p,k} of v's parents, placed into v's input."""
    wire = plan.graph.nodes[v].wire
    if isinstance(wire, int):
        return outputs[wire, k]
    view, sources = plan.nodes[v].input, parents(wire)
    nothing = {p: _wide_zeros_of(moments.outputs[p], plan.dtype) for p in sources}
    x = _wide_zeros_of(moments.x, plan.dtype)
    influence = Influence(plan.nodes[k], plan.trained[k])
    for p in sources:
        if (p, k) not in outputs:
            continue
        output = plan.nodes[p].output

        def place(column: jax.Array, p: int = p, output: RealView = output) -> jax.Array:
            """connect() is linear, so it places one column of an influence as it places a value."""
            value = output.join(output.unflatten(column), output.split(nothing[p]).other)
            placed = connect(wire, x, nothing | {p: value})
            return view.flatten([leaf.astype(plan.dtype) for leaf in view.split(placed).real], leading=1)

        influence = influence.plus(outputs[p, k].map(jax.vmap(place, in_axes=-1, out_axes=-1)))
    return influence


def _wide_zeros_of(tree: PyTree, trace_dtype: Any) -> PyTree:
    return jax.tree.map(lambda leaf: _wide_zeros(leaf, trace_dtype), tree)


def _wide_zeros(leaf: jax.Array, trace_dtype: Any) -> jax.Array:
    """Zeros like ``leaf``, in the traces' dtype where it is real or complex; a key stays as it is."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.zeros(leaf.shape, float32_or_wider(jnp.complex64, trace_dtype))
    return jnp.zeros(leaf.shape, trace_dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
