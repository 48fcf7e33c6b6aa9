"""A seeded grammar of random cells, random networks of them, and the check of the library against its oracles on one.

A cell is written as the pair (F, g) that the oracle needs, carry_t = F(params, carry_tm1, x) and
y = g(params, carry_t, carry_tm1, x), and the library gets nothing but their composition. Every value is bounded by a
squashing function and every recurrence contracts, so that float64 agrees to many digits after a dozen steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deepeprop_jax
from deepeprop_jax.cell import Cell, graph_of
from deepeprop_jax.network import graph, stack
from deepeprop_jax.reference import Pair, bptt, stop_gradient_oracle
from tests.fuzz_grammar import SIZES, Writer, run

PyTree = Any
BATCH = 3

# XLA:CPU without its costly passes compiles these programs in a fifth of the time. The arithmetic is the same.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


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


class _Grown(NamedTuple):
    """A network under construction; the keys of ``pairs`` are paths into params."""

    cell: Cell
    params: PyTree
    carry: PyTree
    pairs: dict[tuple, Pair]
    output: PyTree
    text: list[str]


# -------------------------------------------------------------------------------------------------------------- cells


def _choose(rng: np.random.Generator, options: list) -> Any:
    return options[int(rng.integers(len(options)))]


def _carry_shapes(rng: np.random.Generator) -> list[tuple[int, ...]]:
    """1 to 3 leaves: equal shapes, other sizes, and (2, n) leaves."""
    n = _choose(rng, list(SIZES))
    shapes = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))):
        m = n if rng.random() < 0.7 else _choose(rng, list(SIZES))
        shapes.append((2, m) if rng.random() < 0.15 else (m,))
    return shapes


def _candidate(writer: Writer, shape: tuple[int, ...], fuel: int) -> str:
    """A bounded value of a carry leaf's shape."""
    if len(shape) == 1:
        return writer.vector(shape[0], fuel)
    rows, n = shape
    kind = writer.pick(["reshape", "stack", "outer"])
    if kind == "reshape":
        return writer.emit(f"reshape{shape}", lambda a: a.reshape(shape), writer.vector(rows * n, fuel))
    if kind == "stack":
        return writer.emit("stack", lambda *a: jnp.stack(a), *(writer.vector(n, fuel // 2) for _ in range(rows)))
    return writer.emit("outer", jnp.outer, writer.vector(rows, fuel // 2), writer.vector(n, fuel // 2))


def _new_leaf(writer: Writer, name: str, shape: tuple[int, ...], fuel: int) -> str:
    """One leaf of the new carry, always a value of its own: the old one, contracted towards a candidate."""
    candidate = _candidate(writer, shape, fuel)
    kind = writer.pick(["leaky", "leaky", "gated", "plain", "decay", "clock", "exchange", "halves", "normed"])
    if kind == "gated":
        gate = _candidate(writer, shape, fuel // 2)
        return writer.emit(
            "gated", lambda z, h, c: jax.nn.sigmoid(z) * h + jax.nn.sigmoid(-z) * c, gate, name, candidate
        )
    if kind == "plain":
        recurrent = writer.emit("ravel", jnp.ravel, name)
        drive = writer.dense(int(np.prod(shape)), recurrent)
        return writer.emit("plain", lambda d, c: jnp.tanh(d.reshape(shape) + 0.5 * c), drive, candidate)
    if kind == "decay":
        return writer.emit("decay", lambda h, c: 0.8 * h + 0.3 * c, name, candidate)
    if kind == "clock":
        return writer.emit(
            "clock(where)", lambda h, c: jnp.where(c + h > 0.1, 0.7 * h + 0.3 * c, 0.2 * h - c), name, candidate
        )
    if kind == "exchange":  # units change places: the unit-local block is zero but for a centre
        return writer.emit("exchange", lambda h, c: 0.6 * h[..., ::-1] + 0.2 * h + 0.4 * c, name, candidate)
    if kind == "halves" and shape[-1] > 1:
        return writer.emit("halves", _halves, name, candidate)
    if kind == "normed":
        return writer.emit("normed", lambda h, c: (s := 0.5 * h + c) / jnp.sqrt(jnp.mean(s**2) + 0.5), name, candidate)
    leak = writer.weight(shape, scale=1.0)
    return writer.emit(
        "leaky", lambda a, h, c: jax.nn.sigmoid(a) * h + jax.nn.sigmoid(-a) * c, name, candidate, weights=(leak,)
    )


def _halves(h: jax.Array, c: jax.Array) -> jax.Array:
    half = h.shape[-1] // 2
    return jnp.concatenate([0.7 * h[..., :half] + c[..., :half], jnp.tanh(h[..., half:] - c[..., half:])], -1)


def _output(writer: Writer, new: list[str], fuel: int) -> str:
    """The cell's output, through every leaf of the new carry, sometimes past it."""
    flat = [writer.emit("ravel", jnp.ravel, name) if len(writer.shapes[name]) > 1 else name for name in new]
    joined = writer.emit("concat", lambda *a: jnp.concatenate(a), *flat) if len(flat) > 1 else flat[0]
    kind = writer.pick(["carry", "carry", "dense", "readout", "program", "program"])
    if kind == "carry":
        return joined
    size = writer.size()
    if kind == "dense":
        return writer.dense(size, joined)
    if kind == "readout":
        weights = (writer.weight((size, writer.shapes[joined][0])), writer.weight((size,)))
        return writer.emit("readout", lambda w, b, h: w @ h + b, joined, weights=weights)
    free = writer.vector(size, fuel)
    rest = writer.dense(size, joined)
    return writer.emit("sum", lambda a, b: a + 0.5 * b, free, rest)


def _pack(rng: np.random.Generator, count: int) -> Callable[[list], PyTree]:
    """How a carry's leaves are held: a bare array, a tuple or a dict."""
    if count == 1 and rng.random() < 0.5:
        return lambda leaves: leaves[0]
    if rng.random() < 0.5:
        return tuple
    return lambda leaves: {f"s{i}": leaf for i, leaf in enumerate(leaves)}


def _grow_cell(rng: np.random.Generator, spec: PyTree, forward: bool, name: str, fuel: int) -> _Grown:
    inputs = {f"x{i}": leaf.shape for i, leaf in enumerate(jax.tree.leaves(spec))}
    shapes = [] if forward else _carry_shapes(rng)
    old = {f"h{i}": shape for i, shape in enumerate(shapes)}
    params: dict[str, np.ndarray] = {}
    pack = _pack(rng, len(shapes)) if shapes else tuple

    state = Writer(rng, params, {**inputs, **old}, "a")
    new = []
    for leaf, shape in old.items():
        new.append(_new_leaf(state, leaf, shape, fuel))
        state.offer(new[-1])
    if shapes and not state.used & set(inputs):
        size = int(np.prod(shapes[0]))
        drive = state.dense(size, next(iter(inputs)))
        new[0] = state.emit("driven", lambda h, d: 0.8 * h + 0.4 * d.reshape(h.shape), new[0], drive)

    keys = [f"h{i}'" for i in range(len(new))]
    visible = dict(zip(keys, shapes, strict=True))
    if forward or rng.random() < 0.3:
        visible |= inputs
    if rng.random() < 0.3:
        visible |= old
    output = Writer(rng, params, visible, "b")
    if forward:
        y = output.vector(output.size(), fuel)
        if not output.used:
            y = output.dense(output.size(), "x0")
    else:
        y = _output(output, keys, fuel)

    def carry_fn(p: PyTree, carry: PyTree, x: PyTree) -> PyTree:
        values = dict(zip(inputs, jax.tree.leaves(x), strict=True)) | dict(
            zip(old, jax.tree.leaves(carry), strict=True)
        )
        values = run(state.lines, p, values)
        return pack([values[leaf] for leaf in new])

    def output_fn(p: PyTree, carry_t: PyTree, carry_tm1: PyTree, x: PyTree) -> jax.Array:
        values = dict(zip(inputs, jax.tree.leaves(x), strict=True)) | dict(
            zip(keys, jax.tree.leaves(carry_t), strict=True)
        )
        values |= dict(zip(old, jax.tree.leaves(carry_tm1), strict=True))
        return run(output.lines, p, values)[y]

    carry = pack([jnp.asarray(0.5 * rng.standard_normal((BATCH, *shape))) for shape in shapes])
    params = {key: jnp.asarray(value) for key, value in params.items()}
    sizes = " ".join(f"{key}{list(shape)}" for key, shape in {**inputs, **old}.items())
    text = [f"{name}: {sizes}", *(f"    {line}" for line in state.lines)]
    text += [f"    {key} = {leaf}" for key, leaf in zip(keys, new, strict=True)]
    text += [*(f"    {line}" for line in output.lines), f"    y = {y}"]
    pair = Pair(carry=carry_fn, output=output_fn)
    cell = Cell(lambda key, x: (params, carry), pair.apply)
    out = jax.ShapeDtypeStruct(output.shapes[y], jnp.float64)
    return _Grown(cell, params, carry, {(): pair}, out, text)


# ----------------------------------------------------------------------------------------------------------- networks


def _parts(rng: np.random.Generator, nodes: int) -> list[int]:
    """Nodes per child: mostly one, sometimes a nested network of two or three."""
    parts = []
    while nodes:
        nested = nodes > 2 and rng.random() < 0.3
        parts.append(min(nodes - 1, int(rng.integers(2, 4))) if nested else 1)
        nodes -= parts[-1]
    return [parts[i] for i in rng.permutation(len(parts))]


def _grow(rng: np.random.Generator, nodes: int, spec: PyTree, name: str, fuel: int, top: bool = False) -> _Grown:
    if nodes == 1:
        return _grow_cell(rng, spec, not top and rng.random() < 0.2, name or "cell", fuel)
    if rng.random() < 0.5:
        return _grow_stack(rng, _parts(rng, nodes), spec, name, fuel)
    return _grow_graph(rng, _parts(rng, nodes), spec, name, fuel)


def _grow_stack(rng: np.random.Generator, parts: list[int], spec: PyTree, name: str, fuel: int) -> _Grown:
    children = []
    for index, nodes in enumerate(parts):
        children.append(_grow(rng, nodes, spec, f"{name}/{index}", fuel))
        spec = children[-1].output
    pairs = {(i, *path): pair for i, child in enumerate(children) for path, pair in child.pairs.items()}
    text = [f"{name or 'network'} = stack of {len(children)}"] + [line for child in children for line in child.text]
    return _Grown(
        stack(*(child.cell for child in children)),
        tuple(child.params for child in children),
        tuple(child.carry for child in children),
        pairs,
        spec,
        text,
    )


def _grow_graph(rng: np.random.Generator, parts: list[int], spec: PyTree, name: str, fuel: int) -> _Grown:
    outputs: dict[str, PyTree] = {"input": spec}
    children: dict[str, _Grown] = {}
    wires: dict[str, Any] = {}
    for index, nodes in enumerate(parts):
        child = "abcde"[index]
        below = list(outputs)
        chosen = {below[-1]} if rng.random() < 0.7 else set()  # a DAG of some depth rather than many siblings
        chosen |= {_choose(rng, below) for _ in range(int(rng.integers(1, 3)))}
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
    return _Grown(
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
    spec = jax.ShapeDtypeStruct((_choose(rng, list(SIZES)),), jnp.float64)
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
    state = learner.init(problem.params, problem.carry, problem.xs[0])
    (value, _), grads = _run(learner.value_and_grad(problem.loss_fn), problem, state)
    return value, grads


def _run(function: Callable, problem: Problem, state: PyTree) -> Any:
    compiled = jax.jit(function).lower(problem.params, state, problem.xs, problem.targets).compile(COMPILER_OPTIONS)
    return compiled(problem.params, state, problem.xs, problem.targets)


def leaf_errors(grads: PyTree, wanted: PyTree) -> dict[str, float]:
    """Per parameter leaf: norm of the error over that of the reference, or over 1e-12 of the whole reference's norm."""
    named, structure = jax.tree_util.tree_flatten_with_path(wanted)
    if jax.tree.structure(grads) != structure:
        raise AssertionError(f"The gradient's pytree is {jax.tree.structure(grads)}, that of params {structure}.")
    floor = 1e-12 * float(np.sqrt(sum(np.sum(np.square(leaf)) for _, leaf in named)))
    errors = {}
    for (path, right), got in zip(named, jax.tree.leaves(grads), strict=True):
        error = float(np.linalg.norm(np.ravel(got) - np.ravel(right)))
        scale = max(float(np.linalg.norm(np.ravel(right))), floor)
        errors[jax.tree_util.keystr(path)] = error / scale if error else 0.0
    return errors


def check(problem: Problem, exact: bool, hops: int | None) -> float:
    """Worst relative error of the library on a problem, over its parameter leaves and its loss; nan counts as inf."""
    wanted_loss, wanted = reference(problem, exact, hops)
    got_loss, got = candidate(problem, exact, hops)
    errors = [abs(float(got_loss - wanted_loss)) / abs(float(wanted_loss)), *leaf_errors(got, wanted).values()]
    return max(float(error) if np.isfinite(error) else np.inf for error in errors)
