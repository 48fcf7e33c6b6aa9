"""A seeded grammar of random cells, random networks of them, and the check of the library against its oracles on one.

Every value is bounded by a squashing function and every recurrence contracts, so that float64 agrees to many digits
after a dozen steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deepeprop_jax
from deepeprop_jax.network.build import graph, stack
from deepeprop_jax.network.cell import Cell, graph_of
from deepeprop_jax.reference import Pair, bptt, stop_gradient_oracle
from tests.fuzz.grammar import SIZES
from tests.fuzz.grown_cells import BATCH, Grown, PyTree, choose, grow_cell
from tests.gradients import relative_errors

# XLA:CPU without its costly passes compiles these programs in a fifth of the time. The arithmetic is the same.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    # The older code generator, which later versions no longer have.
    COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False


class Problem(NamedTuple):
    """A network, the (F, g) pairs of its nodes in the order of its graph, and data to differentiate it on."""

    network: Cell
    pairs: tuple[Pair, ...]
    params: PyTree
    carry: PyTree
    xs: jax.Array
    targets: PyTree
    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    description: str


# ----------------------------------------------------------------------------------------------------------- networks


def _parts(rng: np.random.Generator, nodes: int) -> list[int]:
    """Nodes per child: mostly one, sometimes a nested network of two or three."""
    parts = []
    while nodes:
        nested = nodes > 2 and rng.random() < 0.3
        parts.append(min(nodes - 1, int(rng.integers(2, 4))) if nested else 1)
        nodes -= parts[-1]
    return [parts[i] for i in rng.permutation(len(parts))]


def _grow(rng: np.random.Generator, nodes: int, spec: PyTree, name: str, fuel: int, top: bool = False) -> Grown:
    if nodes == 1:
        return grow_cell(rng, spec, not top and rng.random() < 0.2, name or "cell", fuel)
    if rng.random() < 0.5:
        return _grow_stack(rng, _parts(rng, nodes), spec, name, fuel)
    return _grow_graph(rng, _parts(rng, nodes), spec, name, fuel)


def _grow_stack(rng: np.random.Generator, parts: list[int], spec: PyTree, name: str, fuel: int) -> Grown:
    children = []
    for index, nodes in enumerate(parts):
        children.append(_grow(rng, nodes, spec, f"{name}/{index}", fuel))
        spec = children[-1].output
    pairs = {(i, *path): pair for i, child in enumerate(children) for path, pair in child.pairs.items()}
    text = [f"{name or 'network'} = stack of {len(children)}"] + [line for child in children for line in child.text]
    return Grown(
        stack(*(child.cell for child in children)),
        tuple(child.params for child in children),
        tuple(child.carry for child in children),
        pairs,
        spec,
        text,
    )


def _grow_graph(rng: np.random.Generator, parts: list[int], spec: PyTree, name: str, fuel: int) -> Grown:
    outputs: dict[str, PyTree] = {"input": spec}
    children: dict[str, Grown] = {}
    wires: dict[str, Any] = {}
    for index, nodes in enumerate(parts):
        child = "abcde"[index]
        below = list(outputs)
        chosen = {below[-1]} if rng.random() < 0.7 else set()  # a DAG of some depth rather than many siblings
        chosen |= {choose(rng, below) for _ in range(int(rng.integers(1, 3)))}
        chosen_list = [parent for parent in below if parent in chosen][:3]
        arrays = all(isinstance(outputs[parent], jax.ShapeDtypeStruct) for parent in chosen_list)
        if len(chosen_list) == 1:
            wires[child], u = (chosen_list[0] if rng.random() < 0.5 else (chosen_list[0],)), outputs[chosen_list[0]]
        elif arrays and rng.random() < 0.6:
            wires[child] = tuple(chosen_list)
            u = jax.ShapeDtypeStruct((sum(outputs[parent].shape[0] for parent in chosen_list),), jnp.float64)
        else:
            wires[child] = {f"u{i}": parent for i, parent in enumerate(chosen_list)}
            u = {key: outputs[parent] for key, parent in wires[child].items()}
        children[child] = _grow(rng, nodes, u, f"{name}/{child}", fuel)
        outputs[child] = children[child].output
    named = {
        p
        for wire in wires.values()
        for p in ([wire] if isinstance(wire, str) else wire.values() if isinstance(wire, dict) else wire)
    }
    ends = [child for child in children if child not in named or rng.random() < 0.25]
    shuffled = [list(children)[i] for i in rng.permutation(len(children))]  # any order of the dict is allowed
    network = graph(
        {child: (children[child].cell, wires[child]) for child in shuffled},
        outputs=ends[0] if len(ends) == 1 else tuple(ends),
    )
    pairs = {(key, *path): pair for key, child in children.items() for path, pair in child.pairs.items()}
    text = [f"{name or 'network'} = graph {wires} outputs {ends}"] + [
        line for child in children.values() for line in child.text
    ]
    return Grown(
        network,
        {key: child.params for key, child in children.items()},
        {key: child.carry for key, child in children.items()},
        pairs,
        outputs[ends[0]] if len(ends) == 1 else {key: outputs[key] for key in ends},
        text,
    )


# ------------------------------------------------------------------------------------------------- problems and checks


def loss(y: PyTree, target: PyTree) -> jax.Array:
    """A weighted sum over the batch of a smooth, non-quadratic loss of every output leaf."""
    total = 0.0
    for output, wanted in zip(jax.tree.leaves(y), jax.tree.leaves(target["y"]), strict=True):
        error = output - wanted
        total += jnp.sum(target["weight"] * jnp.sum(error**2 + 0.3 * jnp.sin(error), -1))
    return total


def random_problem(
    seed: int, *, nodes: int | None = None, steps: int | None = None, fuel: int | None = None
) -> Problem:
    """The problem of a seed: the same network and the same numbers every time; loss at all steps or at the last alone.

    Args:
      seed: of everything random.
      nodes: number of nodes, 1 to 5 where not given.
      steps: length of the sequence, 6 to 12 where not given.
      fuel: how large each value's program grows; less in larger networks where not given.
    """
    if not jax.config.jax_enable_x64:
        raise ValueError("random_problem() needs float64; set jax_enable_x64 before the first array is made.")
    rng = np.random.default_rng(seed)
    drawn_nodes = int(rng.choice([1, 2, 3, 4, 5], p=[0.3, 0.33, 0.2, 0.1, 0.07]))
    drawn_steps = int(rng.integers(6, 13))
    drawn_fuel = int(rng.integers(1, (4, 4, 3, 3, 2)[drawn_nodes - 1] + 1))
    nodes, steps, fuel = nodes or drawn_nodes, steps or drawn_steps, drawn_fuel if fuel is None else fuel
    spec = jax.ShapeDtypeStruct((choose(rng, list(SIZES)),), jnp.float64)
    grown = _grow(rng, nodes, spec, "", fuel, top=True)
    network = stack(grown.cell) if nodes == 1 and rng.random() < 0.5 else grown.cell
    nested = network is not grown.cell
    params, carry = ((grown.params,), (grown.carry,)) if nested else (grown.params, grown.carry)
    pairs = {(0, *path): pair for path, pair in grown.pairs.items()} if nested else grown.pairs
    last_only = rng.random() < 0.3
    weight = rng.uniform(0.5, 1.5, (steps, BATCH)) * ((np.arange(steps) == steps - 1)[:, None] if last_only else 1.0)
    targets = {
        "y": jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal((steps, BATCH, *leaf.shape))), grown.output),
        "weight": jnp.asarray(weight),
    }
    xs = jnp.asarray(rng.standard_normal((steps, BATCH, *spec.shape)))
    header = f"seed {seed}: {nodes} nodes, T={steps}, loss at {'the last step' if last_only else 'every step'}"
    ordered = tuple(pairs[vertex.path] for vertex in graph_of(network).nodes)
    return Problem(network, ordered, params, carry, xs, targets, loss, "\n".join([header, *grown.text]))


def modes(seed: int) -> list[tuple[bool, int | None]]:
    """The modes (exact, hops) in which a seed's problem is checked: three for all, a fourth in turn."""
    return [(True, None), (False, None), (False, 0), ((True, 0), (False, 1), (True, 1))[seed % 3]]


def reference(problem: Problem, exact: bool, hops: int | None) -> tuple[jax.Array, PyTree]:
    """Loss and gradient of a problem by its oracle."""
    if exact and hops is None:
        oracle = bptt(problem.network, problem.loss_fn)
    else:
        oracle = stop_gradient_oracle(problem.network, problem.loss_fn, problem.pairs, localise=not exact, hops=hops)
    (value, _), grads = _run(oracle, problem, problem.carry)
    return value, grads


def candidate(problem: Problem, exact: bool, hops: int | None) -> tuple[jax.Array, PyTree]:
    """Loss and gradient of a problem by the library."""
    learner = deepeprop_jax.deep_eprop(problem.network, exact=exact, hops=hops)
    state = jax.jit(learner.init)(problem.params, problem.carry, problem.xs[0])
    # Three segments or more, the last one shorter where T is 7 or 11.
    segment_length = {6: 2, 7: 3, 8: 2, 9: 3, 10: 2, 11: 4, 12: 4}.get(problem.xs.shape[0], 2)
    (value, _), grads = _run(learner.value_and_grad(problem.loss_fn, segment_length=segment_length), problem, state)
    return value, grads


def _run(function: Callable, problem: Problem, state: PyTree) -> Any:
    compiled = jax.jit(function).lower(problem.params, state, problem.xs, problem.targets).compile(COMPILER_OPTIONS)
    return compiled(problem.params, state, problem.xs, problem.targets)


def check(problem: Problem, exact: bool, hops: int | None) -> float:
    """Worst relative error of the library on a problem, over its parameter leaves and its loss; nan counts as inf."""
    wanted_loss, wanted = reference(problem, exact, hops)
    got_loss, got = candidate(problem, exact, hops)
    if jax.tree.structure(got) != jax.tree.structure(wanted):
        raise AssertionError(
            f"The gradient's pytree is {jax.tree.structure(got)}, that of params {jax.tree.structure(wanted)}."
        )
    errors = [abs(float(got_loss - wanted_loss)) / abs(float(wanted_loss)), *relative_errors(got, wanted).values()]
    return max(float(error) if np.isfinite(error) else np.inf for error in errors)
