"""The same network, loss and weights in other libraries, where they are installed (docs/peers.md).

braintrace: its weights are rewritten as its own operations, so only the leaky tanh cell is there; ``h W_h`` has no
bias, and all three parameters are in its traced set. memorax: its own RTU cell within its ``RTRL``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.problems import LEAK, Problem, squared_error
from experiments.peers import with_braintrace, with_memorax

LIBRARIES = {"braintrace": (with_braintrace, "leaky tanh"), "memorax": (with_memorax, "RTU")}
"""What finds a library, and the cell that both it and this one have."""


def missing(library: str, problem: Problem) -> str | None:
    """Why it cannot run here; None where it can."""
    module, cell = LIBRARIES[library]
    if problem.cell != cell:
        return f"of {library} only the {cell} cell is here"
    return module.missing()


def _network(problem: Problem, params: tuple) -> Any:
    """The stack of leaky tanh layers in its own words."""
    import brainstate
    import braintrace

    class Leaky(brainstate.nn.Module):
        def __init__(self, params: dict[str, jax.Array]) -> None:
            super().__init__()
            self.weights = {name: brainstate.ParamState(value) for name, value in params.items()}

        def init_state(self, batch_size: int, **_: Any) -> None:
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, problem.features)))

        def update(self, x: jax.Array) -> jax.Array:
            weight = {name: state.value for name, state in self.weights.items()}
            drive = braintrace.matmul(x, weight["Wx"], weight["b"]) + braintrace.matmul(self.h.value, weight["Wh"])
            self.h.value = (1 - LEAK) * self.h.value + LEAK * jnp.tanh(drive)
            return self.h.value

    class Network(brainstate.nn.Module):
        def __init__(self, params: tuple) -> None:
            super().__init__()
            self.layers = [Leaky(layer) for layer in params]

        def update(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return x

    return Network(params)


def by_braintrace(problem: Problem, algorithm: str, *, windows: bool = False, **options: Any) -> Callable[..., Any]:
    """``run(params, carry, xs, targets) -> (loss, grads, end)``.

    Args:
      problem: its segment is the length of a window.
      algorithm: a name known to ``braintrace.compile``.
      windows: windows of C steps (``vjp_method="multi-step"``) instead of one step at a time.
      options: of the algorithm.
    """
    import brainstate
    import braintrace

    def shaped_like(values: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), values)

    params_shape, _, xs, targets = shaped_like(jax.eval_shape(problem.data))
    network = _network(problem, params_shape)
    if windows:
        options["vjp_method"] = "multi-step"
    learner = braintrace.compile(network, algorithm, xs[0], batch_size=problem.batch, **options)

    def step(x: jax.Array, target: jax.Array) -> jax.Array:
        if windows:
            return jax.vmap(squared_error)(learner(braintrace.MultiStepData(x)), target)
        return squared_error(learner(x), target)

    def sequence(xs: jax.Array, targets: jax.Array) -> tuple:
        grads, loss = learner.etrace_grad(
            xs,
            targets,
            step_fn=step,
            chunk_size=problem.segment if windows else None,
            reduction="sum",
            loss_output="scalar",
            return_value=True,
        )
        return loss, [[grads[path] for path in _paths(grads, index)] for index in range(problem.layers)]

    # Its state lives in objects; as a function of all that state it is pure, and is compiled as the others are.
    stateful = brainstate.transform.StatefulFunction(sequence)
    stateful.make_jaxpr(xs, targets)
    states = stateful.get_states(xs, targets)
    values = [jax.tree.map(jnp.asarray, state.value) for state in states]
    weights = [(id(layer.weights[name]), i, name) for i, layer in enumerate(network.layers) for name in layer.weights]
    place = {key: (index, name) for key, index, name in weights}

    def run(params: Any, carry: Any, xs: jax.Array, targets: jax.Array) -> tuple:
        given = []
        for state, value in zip(states, values, strict=True):
            if id(state) in place:
                index, name = place[id(state)]
                value = params[index][name]
            given.append(value)
        end, (loss, grads) = stateful.jaxpr_call(given, xs, targets)
        names = sorted(params[0])
        return loss, tuple(dict(zip(names, layer, strict=True)) for layer in grads), end

    return run


def _paths(grads: dict, layer: int) -> list:
    """Where the gradients of a layer's parameters are, by name."""
    return sorted(path for path in grads if path[:2] == ("layers", layer))


def by_memorax(problem: Problem, length: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``run(params, start, xs, targets) -> (loss, grads, end)``, and ``start(params, carry, xs)``.

    Args:
      problem: of RTU cells.
      length: steps of a piece, whose gradient ``jax.grad`` takes: 1, or a window.
    """
    inputs = [problem.inputs, *[2 * problem.features] * (problem.layers - 1)]
    layers = with_memorax.modules("RTU", problem.features, inputs)

    def loss(params: Any, carries: tuple, xs: jax.Array, targets: jax.Array) -> tuple:
        carries, y = with_memorax.forward("RTU", layers, params, carries, xs)
        return jnp.sum(jax.vmap(squared_error)(y, targets)), carries

    def run(params: Any, carries: tuple, xs: jax.Array, targets: jax.Array) -> tuple:
        return with_memorax.by_pieces(loss, params, carries, xs, targets, length)

    return run, lambda params, carry, xs: with_memorax.start(layers, problem.batch, inputs)
