"""Feedback weights: learning signals made from the loss's cotangent by a matrix, and a third factor that scales them.

    s^v_t = dL_t/dy_t · B^v                                                              broadcast to every node v

B random and fixed: feedback alignment, broadcast (T. P. Lillicrap et al., "Random synaptic feedback weights support
error backpropagation for deep learning", Nature Communications 7, 13276, 2016; A. Nøkland, "Direct feedback alignment
provides learning in deep neural networks", NeurIPS 2016; as the learning signal of e-prop: G. Bellec et al., Nature
Communications 11, 3625, 2020). From layer to layer instead: ``deepeprop_jax.cells.feedback_dense``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.learner.signals import Signal, indices_of
from deepeprop_jax.network.arguments import as_arrays
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import Constant, Graph, Part, PyTree, Wire, connect, graph_of, parents, run_node, select


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["of"])
@dataclasses.dataclass(frozen=True)
class Feedback:
    """A node's feedback weights, and as a function the learning signal that they make. A pytree.

    Attributes:
      weights: B, ``(outputs of the network, *shape of the node's output)``. Several outputs stand one behind the
        other, in pytree order.
      of: where a network's output is a dict, the name of the part that is fed back; None for all of it.
    """

    weights: jax.Array
    of: str | None = None

    def __call__(self, dy: PyTree, target: PyTree = None) -> jax.Array:
        """s = dy · B, ``(batch, *shape of the node's output)``.

        Raises:
          ValueError: outputs that are not as many as the weights' rows.
        """
        part = _part(dy, self.of)
        leaves = RealView(part).split_cotangent(part)
        rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
        if rows.shape[1] != self.weights.shape[0]:
            raise ValueError(
                f"Feedback weights of shape {self.weights.shape} are for {self.weights.shape[0]} outputs; the "
                f"network's output has {rows.shape[1]}. Make them by random_feedback for this network."
            )
        return jnp.tensordot(rows, self.weights.astype(rows.dtype), 1)


def random_feedback(
    key: jax.Array,
    network: object,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    nodes: Sequence[str] | None = None,
    of: str | None = None,
    scale: float | None = None,
) -> dict[str, Feedback]:
    """Random feedback weights for nodes of a network, normal with mean 0.

    Args:
      key: from ``jax.random.key``.
      network, params, carry, x: as for ``learner.init``; shapes are enough.
      nodes: names; None for all nodes with a carry that are not outputs of the network.
      of: where the network's output is a dict, the name of the part that is fed back; None for all of it, the cotangent
        of a node's own output included.
      scale: standard deviation; None for 1 / sqrt(outputs).

    Returns:
      {name: Feedback}, for ``value_and_grad(loss_fn, signals=...)`` of a learner made with ``signals=tuple(names)``. A
      pytree, which may be trained; nothing here changes it.

    Raises:
      ValueError: an unknown node, or one without a carry, whose credit needs no feedback through time; no node at all.

    >>> import flax.linen as nn
    >>> from deepeprop_jax import deep_eprop, stack
    >>> network = stack(nn.GRUCell(features=4), nn.Dense(2))
    >>> xs = jnp.ones((6, 3, 5), jnp.float32)
    >>> params, carry = network.init(jax.random.key(0), xs[0])
    >>> feedback = random_feedback(jax.random.key(1), network, params, carry, xs[0])
    >>> {name: part.weights.shape for name, part in feedback.items()}
    {'0': (2, 4)}
    >>> learner = deep_eprop(network, signals=tuple(feedback))
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2), signals=feedback)
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(6))
    """
    found = {}
    for number, (name, shape, outputs, dtype) in enumerate(_shapes(network, params, carry, x, nodes, of)):
        size = 1 / math.sqrt(outputs) if scale is None else scale
        found[name] = Feedback(size * jax.random.normal(jax.random.fold_in(key, number), (outputs, *shape), dtype), of)
    return found


def symmetric_feedback(
    network: object,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    nodes: Sequence[str] | None = None,
    of: str | None = None,
) -> dict[str, Feedback]:
    """The weights that backpropagation uses within a step: B^v = ∂y_t/∂y^v_t, the mean over the batch.

    Where all above v is linear that is a constant, the readout's weights for a layer below a readout, and the learner's
    gradient that of ``hops=0``. It does not follow the weights when they learn: make it anew.

    Args, raises: as ``random_feedback``; ``params``, ``carry`` and ``x`` are values.

    Returns:
      {name: Feedback}.
    """
    params, carry, x = as_arrays(params, "params"), as_arrays(carry, "carry"), as_arrays(x, "x")
    graph = graph_of(as_cell(network))
    found = {}
    for name, shape, outputs, dtype in _shapes(network, params, carry, x, nodes, of):
        (v,) = indices_of(graph, (name,))

        def flat(change: jax.Array, params: PyTree, carry: PyTree, x: PyTree, v: int = v) -> jax.Array:
            y = _part(_outputs(graph, params, carry, x, {v: change})[1], of)
            return jnp.concatenate([leaf.ravel() for leaf in RealView(y).split(y).real])

        over = jax.vmap(jax.jacrev(flat), (None, None, 0, 0))
        weights = over(jnp.zeros(shape, dtype), params, carry, x).mean(0)
        found[name] = Feedback(weights.reshape(outputs, *shape), of)
    return found


def sign_feedback(
    network: object,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    nodes: Sequence[str] | None = None,
    of: str | None = None,
) -> dict[str, Feedback]:
    """The signs of ``symmetric_feedback``, all of its mean absolute size: sign-symmetry.

    Reference: Q. Liao, J. Z. Leibo, T. Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016.
    """
    exact = symmetric_feedback(network, params, carry, x, nodes=nodes, of=of)
    return jax.tree.map(lambda leaf: jnp.sign(leaf) * jnp.abs(leaf).mean(), exact)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["signal"], meta_fields=["factor"])
@dataclasses.dataclass(frozen=True)
class Scaled:
    """What ``third_factor`` returns. A pytree, if ``signal`` is one."""

    signal: Signal
    factor: Callable[[PyTree], jax.Array]

    def __call__(self, dy: PyTree, target: PyTree) -> PyTree:
        size = jnp.asarray(self.factor(target))
        if size.ndim != 1:
            raise ValueError(f"A third factor is one number for each example, (batch,); seen shape {size.shape}.")
        found = self.signal(dy, target)
        return jax.tree.map(lambda s: s * size.reshape(-1, *(1,) * (s.ndim - 1)).astype(s.dtype), found)


def third_factor(signal: Signal, factor: Callable[[PyTree], jax.Array]) -> Scaled:
    """A learning signal times one number for each example, such as a reward or the level of a neuromodulator.

    Args:
      signal: for one node, such as ``random_feedback`` gives.
      factor: ``factor(target_t) -> (batch,)``.

    >>> signal = third_factor(Feedback(jnp.ones((1, 2))), lambda target: target["reward"])
    >>> signal(jnp.ones((2, 1)), {"reward": jnp.array([0.0, 3.0])}).tolist()
    [[0.0, 0.0], [3.0, 3.0]]
    """
    return Scaled(signal, factor)


def _part(y: PyTree, of: str | None) -> PyTree:
    """The part of a network's output that is fed back.

    Raises:
      ValueError: a name that the output does not have.
    """
    if of is None:
        return y
    if not isinstance(y, dict) or of not in y:
        seen = f"the parts {list(y)}" if isinstance(y, dict) else "no parts with names"
        raise ValueError(f"of={of!r} names a part of the network's output, which has {seen}.")
    return y[of]


class _Shape(NamedTuple):
    name: str
    shape: tuple[int, ...]
    outputs: int
    dtype: jnp.dtype


def _shapes(
    network: object, params: PyTree, carry: PyTree, x: PyTree, names: Sequence[str] | None, of: str | None
) -> list[_Shape]:
    """Of the nodes named, one real array each, and of the network's outputs."""
    graph = graph_of(as_cell(network))
    h, u = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree) for tree in (carry, x))
    nodes, y = jax.eval_shape(lambda *args: _outputs(graph, args[0], args[1], args[2], {}), params, h, u)
    y = _part(y, of)
    recurrent = [RealView(select(h, vertex.path)).size > 0 for vertex in graph.nodes]
    if names is None:
        chosen = [v for v in range(len(nodes)) if recurrent[v] and v not in _shown(graph.output)]
    else:
        chosen = list(indices_of(graph, tuple(names)))
    if not chosen:
        raise ValueError(
            "No node of this network has a carry and is not its output, so none needs feedback; name some."
        )
    found = []
    for v in chosen:
        name, view = graph.nodes[v].name, RealView(nodes[v]["output"] if graph.nodes[v].shows else nodes[v])
        if not recurrent[v]:
            raise ValueError(
                f"Node {name!r} has no carry: its credit does not go through time, and needs no feedback. Name a node "
                f"with a carry, or give a signal of your own for this one."
            )
        if len(view.avals) != 1 or len(view.real_avals) != 1:
            raise ValueError(
                f"Feedback weights are for nodes whose output is one real array; that of node {name!r} is "
                f"{[str(aval) for aval in view.avals]}. Give a function (dy, target) -> signal of your own."
            )
        found.append(_Shape(name, view.shapes[0], RealView(y).size, view.dtypes[0]))
    return found


def _outputs(
    graph: Graph, params: PyTree, carry: PyTree, x: PyTree, added: dict[int, jax.Array]
) -> tuple[list[PyTree], PyTree]:
    """The outputs of all nodes, and that of the network, in one step of one example.

    Args:
      added: per node what is added to its output.
    """
    found: list[PyTree] = []
    shown: list[PyTree] = []  # what a loss on an output itself sees is no way up
    for v, vertex in enumerate(graph.nodes):
        u, theta, h = connect(vertex.wire, x, found), select(params, vertex.path), select(carry, vertex.path)
        y = run_node(vertex, theta, h, u)[1]
        shown.append(y)
        if v in added:
            y = y | {"output": y["output"] + added[v]} if vertex.shows else y + added[v]
        found.append(y)
    return found, connect(graph.output, x, shown)


def _shown(wire: Wire) -> set[int]:
    """The nodes whose own outputs are in the network's."""
    if isinstance(wire, Part):
        of_carry = isinstance(wire.wire, Part) and wire.wire.key == "carry"
        return set() if of_carry else set(parents(wire))
    if isinstance(wire, str | int | Constant):
        return set(parents(wire))
    return set().union(*map(_shown, wire.values() if isinstance(wire, Mapping) else wire))
