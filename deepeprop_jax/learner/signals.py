"""Learning signals that the user gives: per node, what stands in place of the cotangent that would come from above.

The gradient is that of the network whose other nodes take y^v as a constant, with a loss that has the term

    Σ_t y^v_t · s^v_t,        s^v a constant
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.network.arguments import path_name
from deepeprop_jax.network.cell import Graph, PyTree
from deepeprop_jax.traces.plan import Plan


class Signal(Protocol):
    """The learning signal of one node at one step, from what the network's outputs are told.

    Args:
      dy: dL_t/dy_t, the cotangent of the network's outputs, (batch, ...), in ``jax.grad``'s convention.
      target: that of the step.

    Returns:
      s_t, which stands for dL/dy^v_t: (batch, ...), shaped as the node's output.
    """

    def __call__(self, dy: PyTree, target: PyTree) -> PyTree: ...


def indices_of(graph: Graph, names: object) -> tuple[int, ...]:
    """The nodes that ``deep_eprop`` is to have signals for.

    Raises:
      TypeError: no tuple or list of names.
      ValueError: an unknown name, or one twice.
    """
    if isinstance(names, str) or not isinstance(names, tuple | list) or any(not isinstance(n, str) for n in names):
        raise TypeError(f"signals must be a tuple of nodes' names, such as ('0',); seen {names!r}.")
    known = {vertex.name: v for v, vertex in enumerate(graph.nodes)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"signals names the unknown node {unknown[0]!r}; the network's nodes are {list(known)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"signals names a node twice: {tuple(names)}.")
    return tuple(known[name] for name in names)


def by_index(plan: Plan, given: object) -> dict[int, PyTree]:
    """What was given for every node that the learner was made for.

    Raises:
      TypeError: no dict by name.
      ValueError: a node without a signal, or a signal for another one.
    """
    nodes, given = plan.given, {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(f"signals must be a dict {{node's name: its signal}}; seen {type(given).__name__}.")
    missing, others = [n for n in nodes if n not in given], [n for n in given if n not in nodes]
    if missing:
        raise ValueError(
            f"This learner was made by deep_eprop(..., signals={tuple(nodes)}), and no signal is given for the node "
            f"{missing[0]!r}. Give signals={{name: signal}} with all of them."
        )
    if others:
        raise ValueError(
            f"A signal is given for the node {others[0]!r}, and this learner was made for signals of "
            f"{list(nodes) or 'no node'}. Name the node in deep_eprop(..., signals=(...)): what is carried depends on "
            f"it."
        )
    return {v: given[name] for name, v in nodes.items()}


def check_functions(given: Mapping[int, object]) -> None:
    """A sequence's signals are made at every step."""
    wrong = [signal for signal in given.values() if not callable(signal)]
    if wrong:
        raise TypeError(
            f"In value_and_grad a signal is a function (dy_t, target_t) -> (batch, ...), as random_feedback gives it; "
            f"seen {type(wrong[0]).__name__}. Put a signal that is known before into targets, and read it there."
        )


def shaped(plan: Plan, v: int, signal: PyTree, batch: int) -> PyTree:
    """A signal in the dtypes of the node's output.

    Raises:
      ValueError: another structure or shape than that of the batched output.
    """
    view, name = plan.nodes[v].output, plan.graph.nodes[v].name
    whole = jax.tree.unflatten(view.treedef, view.avals)
    if plan.graph.nodes[v].shows:
        own, nothing = RealView(whole["output"]), jax.tree.map(partial(_zeros, batch), whole["carry"])
        return {"output": _like(own, name, signal, batch), "carry": nothing}
    return _like(view, name, signal, batch)


def _zeros(batch: int, aval: jax.ShapeDtypeStruct) -> jax.Array:
    """In the place of a cotangent; what has none, as a PRNG key, is not looked at."""
    return jnp.zeros((batch, *aval.shape), aval.dtype if jnp.issubdtype(aval.dtype, jnp.inexact) else int)


def _like(view: RealView, name: str, signal: PyTree, batch: int) -> PyTree:
    if jax.tree.structure(signal) != view.treedef:
        raise ValueError(
            f"The signal of node {name!r} must have the structure of its output, {view.treedef}; seen "
            f"{jax.tree.structure(signal)}."
        )
    like = jax.tree.unflatten(view.treedef, view.avals)

    def cast(path: tuple, leaf: jax.Array, aval: jax.ShapeDtypeStruct) -> jax.Array:
        leaf, needed = jnp.asarray(leaf), (batch, *aval.shape)
        if leaf.shape != needed or (jnp.iscomplexobj(leaf) and not jnp.issubdtype(aval.dtype, jnp.complexfloating)):
            raise ValueError(
                f"The signal of node {name!r} at '{path_name(path)}': seen {leaf.dtype}{list(leaf.shape)}, needed "
                f"{aval.dtype}{list(needed)}, the batched output of the node."
            )
        return leaf.astype(aval.dtype)

    return jax.tree_util.tree_map_with_path(cast, signal, like)
