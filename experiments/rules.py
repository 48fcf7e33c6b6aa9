"""The learning rules that the experiments compare: one line each in ``RULES``.

A rule is one way to get a gradient, everything else (data, seeds, optimiser) being the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from deepeprop_jax import Cell, deep_eprop
from deepeprop_jax.reference import bptt

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]


class Rule(NamedTuple):
    """A learning rule for one network and loss.

    Attributes:
      gradient: ``gradient(params, carry, xs, targets) -> (loss, grads)``, summed over the steps of the sequence.
      trace_bytes: ``trace_bytes(params, carry, x)``: what the rule carries from step to step besides the network's own
        carry; None for BPTT, which carries nothing and stores every step instead.
    """

    gradient: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]]
    trace_bytes: Callable[[PyTree, PyTree, PyTree], int | None]


def backward(network: Cell, loss_fn: LossFn) -> Rule:
    """Backpropagation through time."""

    def gradient(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree) -> tuple[jax.Array, PyTree]:
        (loss, _), grads = bptt(network, loss_fn)(params, carry, xs, targets)
        return loss, grads

    return Rule(gradient, lambda params, carry, x: None)


def online(network: Cell, loss_fn: LossFn, **options: Any) -> Rule:
    """Forward in time, by traces alone; ``options`` are those of ``deep_eprop``."""
    learner = deep_eprop(network, **options)

    def gradient(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree) -> tuple[jax.Array, PyTree]:
        state = learner.init(params, carry, jax.tree.map(lambda leaf: leaf[0], xs))
        # Every step moves the traces: sequences this short would be one segment, which goes back through its steps.
        (loss, _), grads = learner.value_and_grad(loss_fn, segment_length=1)(params, state, xs, targets)
        return loss, grads

    def trace_bytes(params: PyTree, carry: PyTree, x: PyTree) -> int:
        state = jax.eval_shape(learner.init, params, carry, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.traces))

    return Rule(gradient, trace_bytes)


def all_but_lowest(params: tuple) -> tuple:
    """A mask for ``trainable``: every parameter except those of a stack's lowest layer."""
    return tuple(jax.tree.map(lambda _, keep=index > 0: keep, layer) for index, layer in enumerate(params))


RULES: dict[str, Callable[[Cell, LossFn, PyTree], Rule]] = {
    "BPTT": lambda network, loss_fn, params: backward(network, loss_fn),
    "exact RTRL": lambda network, loss_fn, params: online(network, loss_fn, exact=True),
    "deep e-prop": lambda network, loss_fn, params: online(network, loss_fn),
    "hops = 0": lambda network, loss_fn, params: online(network, loss_fn, hops=0),
    "lower frozen": lambda network, loss_fn, params: online(network, loss_fn, trainable=all_but_lowest(params)),
}
