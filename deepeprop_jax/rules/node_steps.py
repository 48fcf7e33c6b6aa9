"""One step of a network with every node's past put in by hand: what SnAp and RFLO are made of.

A node's new carry is h_t = F(θ, h_{t-1}, u_t) and its output y_t = g(θ, h_t, h_{t-1}, u_t); u_t is made of the outputs
of the nodes below. Here all nodes' carries are one vector h, all parameters one vector theta:

    h_t, y_t  =  step(theta, h_F, h_g, c)        F reads h_F, g reads h_g; c is added to what F gives

With h_F = h_g = h_{t-1} and c = 0 it is the network's step. ``c`` is where a rule puts in what it keeps of the past: it
then goes up through the layers above within the step, as the new carry does.

    past_t  =  what the rule makes of S_{t-1}, in place of ∂F/∂h · S_{t-1}, node by node
    I_t     =  ∂h_t/∂c · past_t  +  ∂h_t/∂h_g · S_{t-1}  +  ∂h_t/∂theta
    Y_t     =  ∂y_t/∂c · past_t  +  ∂y_t/∂h_g · S_{t-1}  +  ∂y_t/∂theta
    S_t     =  the entries of I_t that the rule keeps

    gradient_t  =  ∂L_t/∂y_t · Y_t

With past = ∂F/∂h · S and every entry kept this is real-time recurrent learning, and exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.node import Node, Others, Reals
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.network.cell import PyTree, connect, select
from deepeprop_jax.rules.by_steps import Recursion
from deepeprop_jax.rules.flat import leaves, number_type, vector
from deepeprop_jax.traces.plan import Plan


class Layer(NamedTuple):
    """One node, or one layer of a ``stack(cell, depth=L)``.

    Attributes:
      node: what was found out about it.
      vertex: its place among the network's nodes.
      level: l for layer l of a deep node, else None.
      start: of its carry in h.
    """

    node: Node
    vertex: int
    level: int | None
    start: int

    @property
    def own(self) -> slice:
        """Where its carry stands in h."""
        return slice(self.start, self.start + self.node.carry.size)

    def part(self, plan: Plan, tree: PyTree) -> PyTree:
        """Its own part of the network's params or carry."""
        own = select(tree, plan.graph.nodes[self.vertex].path)
        return own if self.level is None else jax.tree.map(lambda leaf: leaf[self.level], own)


class Visit(NamedTuple):
    """What a layer's F is taken at: real leaves of its params, old carry and input, and the other leaves of them."""

    layer: Layer
    params: Reals
    carry_tm1: Reals
    input: Reals
    others: Others


class Taken(NamedTuple):
    """A step of one example, and its derivatives.

    Attributes:
      visits: per layer.
      F_h: (n, n) ∂F/∂h of every layer by its own old carry; zero elsewhere.
      h_c, h_g, h_theta: (n, ...) ∂h_t by c, h_g and theta.
      y_c, y_g, y_theta: (|y|, ...) likewise of y_t.
    """

    visits: list[Visit]
    F_h: jax.Array
    h_c: jax.Array
    h_g: jax.Array
    h_theta: jax.Array
    y_c: jax.Array
    y_g: jax.Array
    y_theta: jax.Array


Past = Callable[[np.ndarray, Taken, jax.Array], jax.Array]
"""``past(kept, taken, S_tm1) -> past_t``, (n, |θ|); ``kept`` as in ``with_past``."""


class Memory(NamedTuple):
    """S (n, |θ|) on the carries, and Y (|y|, |θ|) on the last output."""

    S: jax.Array
    Y: jax.Array


def layers_of(plan: Plan) -> list[Layer]:
    """The layers of a network, from below."""
    found: list[Layer] = []
    start = 0
    for v, node in enumerate(plan.nodes):
        depth = plan.graph.nodes[v].depth
        for level in range(depth or 1):
            found.append(Layer(node, v, None if depth is None else level, start))
            start += node.carry.size
    return found


def size_of(layers: list[Layer]) -> int:
    """n, all numbers of all carries."""
    return layers[-1].own.stop


def places(plan: Plan, layer: Layer, params: RealView) -> list[np.ndarray]:
    """Per real parameter leaf of a layer, in its shape, where its entries stand in theta."""
    names = jax.tree.unflatten(params.treedef, range(len(params.kinds)))
    first = np.cumsum([0, *(kind.value for kind in params.kinds)])  # of each leaf, its first real one
    starts = np.cumsum([0, *params.sizes])
    found = []
    for leaf in jax.tree.leaves(select(names, plan.graph.nodes[layer.vertex].path)):
        for real in range(first[leaf], first[leaf + 1]):
            numbers = np.arange(starts[real], starts[real + 1]).reshape(params.shapes[real])
            found.append(numbers if layer.level is None else numbers[layer.level])
    return found


def take_step(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree) -> Taken:
    """A step of one example with all its derivatives."""
    layers, view, dtype = layers_of(plan), RealView(params), number_type(params, carry_tm1)
    split = view.split(params)
    before = [layer.node.carry.split(layer.part(plan, carry_tm1)) for layer in layers]
    h_tm1 = jnp.concatenate([vector(parts.real, dtype) for parts in before])

    def step(theta: jax.Array, h_F: jax.Array, h_g: jax.Array, c: jax.Array) -> tuple[jax.Array, tuple]:
        weights = view.join(leaves(view, theta), split.other)
        new: list[jax.Array] = []
        outputs: dict[int, PyTree] = {}
        visits: list[Visit] = []
        for layer, at in zip(layers, before, strict=True):
            node, own = layer.node, layer.own
            p = node.params.split(layer.part(plan, weights))
            below = connect(plan.graph.nodes[layer.vertex].wire, x, outputs)
            u = node.input.split(outputs[layer.vertex] if layer.level else below)
            visit = Visit(layer, p.real, leaves(node.carry, h_F[own]), u.real, (p.other, at.other, u.other))
            carry_t = node.cut.next_carry(*visit[1:], at.real)
            h_t = [leaf + kept for leaf, kept in zip(carry_t.real, leaves(node.carry, c[own]), strict=True)]
            # A carry leaf that is a function of others moves with them (analysis/derived_carry.py).
            fixed, point = jax.lax.stop_gradient((carry_t.other, h_t))
            old = leaves(node.carry, h_g[own])
            y_t = node.cut.output(p.real, h_t, old, u.real, visit.others, fixed, (point, at.real))
            outputs[layer.vertex] = node.output.join(*y_t)
            new.append(vector(h_t, dtype))
            visits.append(visit)
        y = connect(plan.graph.output, x, outputs)
        both = jnp.concatenate([*new, vector(plan.output.split(y).real, dtype)])
        return both, tuple(visit[1:] for visit in visits)

    at_point = vector(split.real, dtype), h_tm1, h_tm1, jnp.zeros_like(h_tm1)
    (theta, F, g, c), visits = jax.jacrev(step, argnums=(0, 1, 2, 3), has_aux=True)(*at_point)
    n = len(h_tm1)
    same = np.zeros((n, n), bool)
    for layer in layers:
        same[layer.own, layer.own] = True
    seen = [Visit(layer, *visit) for layer, visit in zip(layers, visits, strict=True)]
    return Taken(seen, jnp.where(same, F[:n], 0), c[:n], g[:n], theta[:n], c[n:], g[n:], theta[n:])


def with_past(past: Past, kept: Callable[[Plan, RealView], np.ndarray]) -> Recursion:
    """The recursion at the head of this file.

    Args:
      past: what stands in place of ∂F/∂h · S.
      kept: ``kept(plan, params)``, (n, |θ|) bool: which entries stay in S; ``params`` is the view of all of them.
    """

    def first(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Memory:
        dtype, columns = number_type(params, carry), RealView(params).size
        return Memory(
            jnp.zeros((size_of(layers_of(plan)), columns), dtype), jnp.zeros((plan.output.size, columns), dtype)
        )

    def move(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree, memory: Memory, key: None) -> Memory:
        S_tm1, taken, mask = memory.S, take_step(plan, params, carry_tm1, x), kept(plan, RealView(params))
        past_t = past(mask, taken, S_tm1)
        I_t = taken.h_c @ past_t + taken.h_g @ S_tm1 + taken.h_theta
        Y_t = taken.y_c @ past_t + taken.y_g @ S_tm1 + taken.y_theta
        return Memory(jnp.where(mask, I_t, 0), Y_t)

    def gradient(plan: Plan, params, carry_tm1, x, memory_tm1: Memory, memory_t: Memory, dy: jax.Array) -> jax.Array:
        return dy @ memory_t.Y

    return Recursion(first, move, gradient)
