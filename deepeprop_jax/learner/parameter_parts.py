"""A learner whose traces are split by parameters: each device holds those of its own part, and gives its gradient.

    S^{v,k} <- D S^{v,k} + ...        acts on the rows of a trace, the carry; its columns, parameters, never meet

So nothing is sent in time: every device runs the whole network, which is small beside its traces, and moves the columns
of its part. The parts' programs differ only in where they slice, and are run as one (``jaxpr/merged.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.jaxpr.merged import NotAlike, merged
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner
from deepeprop_jax.network.cell import PyTree, assemble, graph_of, reduced, select
from deepeprop_jax.network.parts import PartOfParams, axis_of, is_number, layers_of, learning_part, with_parts

OF_THE_WHOLE = ("rank", "carry_factor")
"""Options that keep one product for all weights of a node, which their parts do not give."""


class ParameterParts:
    """The functions of a learner, inside ``shard_map``, as one device has them; see ``OnlineLearner``.

    What they give of loss and gradient is this device's part of a sum.

    Args:
      learner: from ``deep_eprop``.
      axes: of the mesh, along which parameters are split.
      parts: into how many.
    """

    def __init__(self, learner: OnlineLearner, axes: tuple[str, ...], parts: int):
        made_by = reduced(learner)[0]
        call = made_by.keywords if isinstance(made_by, functools.partial) else {}
        if not isinstance(made_by, functools.partial) or "trainable" not in call:
            raise ValueError("unit= needs a learner of deep_eprop, whose traces have columns that never meet.")
        given = [name for name in OF_THE_WHOLE if call.get(name) is not None]
        if given:
            raise ValueError(
                f"{given[0]}={call[given[0]]} keeps one product for all weights of a node, which products of their "
                f"parts do not give: leave it out, or split the batch alone."
            )
        network, make = learner.network, made_by.func
        self.network, self._graph, self._axes, self._parts = network, graph_of(network), axes, parts
        options = call | {"trainable": functools.partial(self._trainable, call["trainable"])}
        self._learners = [make(learning_part(network, number, parts), **options) for number in range(parts)]

    def _trainable(self, trainable: PyTree, params: PyTree) -> PyTree:
        """Which params of ``with_parts`` are: what is said of the network's, for their own parts."""
        parts = [select(params, vertex.path) for vertex in self._graph.nodes]
        whole = assemble(self._graph, [part.rest for part in parts])
        mask = True if trainable is None else trainable(whole) if callable(trainable) else trainable
        full = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, whole)
        found = []
        for vertex, part in zip(self._graph.nodes, parts, strict=True):
            flags = jax.tree.leaves(select(full, vertex.path))
            own = [flag for flag, leaf in zip(flags, jax.tree.leaves(part.rest), strict=True) if is_number(leaf)]
            found.append(PartOfParams(own, jax.tree.map(lambda _: False, part.rest)))
        return assemble(self._graph, found)

    def shapes(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        """Of a device's state, but for the batch, which is that of the arguments."""
        return jax.eval_shape(lambda *given: self._learners[0].init(*self._with_parts(*given)), params, carry, x)

    def _with_parts(self, params: PyTree, *others: PyTree) -> tuple:
        return (with_parts(self._graph, params, self._parts), *others)

    def _run(self, functions: Sequence[Callable[..., PyTree]], *arguments: PyTree) -> PyTree:
        """The function of this device's part."""
        shapes = jax.eval_shape(functions[0], *arguments)
        try:
            run = merged([trace(function, *arguments) for function in functions])
            found = run(lax.axis_index(self._axes), jax.tree.leaves(arguments))
        except NotAlike as error:
            raise ValueError(
                f"The {self._parts} parts of these parameters along {self._axes} are not learnt by one program: "
                f"{error}. Split the batch alone, or into another number of parts."
            ) from error
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    def _first(self) -> jax.Array:
        return lax.axis_index(self._axes) == 0

    def init(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        return self._run([learner.init for learner in self._learners], *self._with_parts(params, carry, x))

    def step(self, params: PyTree, state: LearnerState, x: PyTree) -> tuple[LearnerState, PyTree]:
        return self._run([learner.step for learner in self._learners], *self._with_parts(params, state, x))

    def gradient(self, params: PyTree, state: LearnerState, dy: PyTree, **options: PyTree) -> PyTree:
        functions = [
            lambda params, state, dy, options, learner=learner: learner.gradient(params, state, dy, **options)
            for learner in self._learners
        ]
        return self._placed(self._run(functions, *self._with_parts(params, state, dy, options)), params)

    def value_and_grad(self, loss_fn: Callable[..., PyTree], **options) -> Callable[..., PyTree]:
        functions = [learner.value_and_grad(loss_fn, **options) for learner in self._learners]
        has_aux = options.get("has_aux", False)

        def run(params: PyTree, *arguments: PyTree) -> PyTree:
            (loss, end), grads = self._run(functions, *self._with_parts(params, *arguments))
            loss, aux = loss if has_aux else (loss, None)
            loss = jnp.where(self._first(), loss, jnp.zeros_like(loss))  # all parts see the same
            return ((loss, aux) if has_aux else loss, end), self._placed(grads, params)

        return run

    def reset(self, state: LearnerState, where: jax.Array) -> LearnerState:
        return self._learners[0].reset(state, where)  # the same for all parts

    def _placed(self, grads: PyTree, params: PyTree) -> PyTree:
        """A part's gradient in the place that it has in that of params, zeros elsewhere."""
        number, found = lax.axis_index(self._axes), []
        for vertex, layers in zip(self._graph.nodes, layers_of(self._graph), strict=True):
            part = select(grads, vertex.path)
            leaves, structure = jax.tree.flatten(part.rest)
            own = iter(part.own)
            for i, whole in enumerate(jax.tree.leaves(select(params, vertex.path))):
                if not is_number(whole):
                    continue
                axis, grad = axis_of(jnp.shape(whole), self._parts, layers), next(own)
                if axis is None:
                    leaves[i] = jnp.where(self._first(), grad, jnp.zeros_like(grad))
                else:
                    start = number * grad.shape[axis]
                    leaves[i] = lax.dynamic_update_slice_in_dim(jnp.zeros_like(leaves[i]), grad, start, axis)
            found.append(structure.unflatten(leaves))
        return assemble(self._graph, found)
