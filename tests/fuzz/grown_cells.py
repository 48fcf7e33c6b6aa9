"""Random cells, written as the pair (F, g) that the oracle needs, carry_t = F(params, carry_tm1, x) and
y = g(params, carry_t, carry_tm1, x). The library gets one program that runs both, and shares what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.network.cell import Cell
from deepeprop_jax.reference import Pair
from tests.fuzz.grammar import SIZES, Line, Writer, run

PyTree = Any
BATCH = 3


class Grown(NamedTuple):
    """A network under construction; the keys of ``pairs`` are paths into params."""

    cell: Cell
    params: PyTree
    carry: PyTree
    pairs: dict[tuple, Pair]
    output: PyTree
    text: list[str]


def choose(rng: np.random.Generator, options: list) -> Any:
    return options[int(rng.integers(len(options)))]


def _carry_shapes(rng: np.random.Generator) -> list[tuple[int, ...]]:
    """1 to 3 leaves: equal shapes, other sizes, and (2, n) leaves."""
    n = choose(rng, list(SIZES))
    shapes = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))):
        m = n if rng.random() < 0.7 else choose(rng, list(SIZES))
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


@jax.custom_vjp
def _two_ways(leak: jax.Array, h: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.tanh(0.7 * h + leak * c), h * c


_two_ways.defvjp(
    lambda leak, h, c: (_two_ways(leak, h, c), (leak, h, c)),
    lambda seen, cts: (cts[0] * seen[2], 0.6 * cts[0] + cts[1] * seen[2], 0.5 * seen[0] * cts[0] + cts[1] * seen[1]),
)


def _two_of_a_cond(leak: jax.Array, h: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.cond(
        c.ravel()[0] > 0.02,
        lambda h, c: (0.6 * h + leak * c, jnp.tanh(h * c)),
        lambda h, c: (0.3 * h - 0.5 * c, jnp.sin(leak * h - c)),
        h,
        c,
    )


def _two_of_a_scan(leak: jax.Array, h: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    last, seen = jax.lax.scan(lambda s, _: (jnp.tanh(0.7 * s + leak * c), s * c), h, None, length=2)
    return last, seen.mean(0)


def _shared(writer: Writer, name: str, new: str) -> tuple[str, str]:
    """One equation whose results are a leaf of the new carry, and something else that the output reads."""
    functions = {"two of a cond": _two_of_a_cond, "two of a scan": _two_of_a_scan, "two of a custom_vjp": _two_ways}
    kind, shape = writer.pick(list(functions)), writer.shapes[name]
    leak, both = writer.weight(shape, scale=0.5), f"both{len(writer.lines)}"
    writer.lines.append(Line(both, functions[kind], (leak,), (name, new), kind))
    for index in (0, 1):
        writer.shapes[f"{both}.{index}"] = shape
        writer.lines.append(Line(f"{both}.{index}", lambda pair, i=index: pair[i], (), (both,), f"result {index} of"))
    return f"{both}.0", f"{both}.1"


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


def _new_carry(state: Writer, inputs: dict[str, tuple[int, ...]], old: dict[str, tuple[int, ...]], fuel: int) -> list:
    """The new leaf of each old one; some input is read on the way."""
    new = []
    for leaf, shape in old.items():
        new.append(_new_leaf(state, leaf, shape, fuel))
        state.offer(new[-1])
    if new and not state.used & set(inputs):
        size = int(np.prod(next(iter(old.values()))))
        drive = state.dense(size, next(iter(inputs)))
        new[0] = state.emit("driven", lambda h, d: 0.8 * h + 0.4 * d.reshape(h.shape), new[0], drive)
    return new


def grow_cell(rng: np.random.Generator, spec: PyTree, forward: bool, name: str, fuel: int) -> Grown:
    inputs = {f"x{i}": leaf.shape for i, leaf in enumerate(jax.tree.leaves(spec))}
    shapes = [] if forward else _carry_shapes(rng)
    old = {f"h{i}": shape for i, shape in enumerate(shapes)}
    params: dict[str, np.ndarray] = {}
    pack = _pack(rng, len(shapes)) if shapes else tuple

    state = Writer(rng, params, {**inputs, **old}, "a")
    new = _new_carry(state, inputs, old, fuel)
    shared: dict[str, tuple[int, ...]] = {}  # what F computes on the way and g reads as well
    if shapes and rng.random() < 0.3:
        new[-1], beside = _shared(state, list(old)[-1], new[-1])
        shared[beside] = state.shapes[beside]

    keys = [f"h{i}'" for i in range(len(new))]
    visible = dict(zip(keys, shapes, strict=True))
    if forward or rng.random() < 0.3:
        visible |= inputs
    if rng.random() < 0.3:
        visible |= old
    output = Writer(rng, params, visible | shared, "b")
    if forward:
        y = output.vector(output.size(), fuel)
        if not output.used:
            y = output.dense(output.size(), "x0")
    else:
        y = _output(output, keys, fuel)
    for beside in shared:
        flat = output.emit("ravel", jnp.ravel, beside)
        (size,) = output.shapes[y]
        y = output.emit("beside", lambda y, e: y + e, y, output.dense(size, flat))

    def named(carry_tm1: PyTree, x: PyTree) -> dict[str, jax.Array]:
        names, leaves = [*inputs, *old], jax.tree.leaves(x) + jax.tree.leaves(carry_tm1)
        return dict(zip(names, leaves, strict=True))

    def carry_fn(p: PyTree, carry_tm1: PyTree, x: PyTree) -> PyTree:
        values = run(state.lines, p, named(carry_tm1, x))
        return pack([values[leaf] for leaf in new])

    def output_fn(p: PyTree, carry_t: PyTree, carry_tm1: PyTree, x: PyTree) -> jax.Array:
        values = named(carry_tm1, x) | dict(zip(keys, jax.tree.leaves(carry_t), strict=True))
        if shared:  # computed on the way to the new carry: what lies behind another of its leaves is a function of that
            way = run(state.lines, p, named(carry_tm1, x) | dict(zip(new, jax.tree.leaves(carry_t), strict=True)))
            values |= {name: way[name] for name in shared}
        return run(output.lines, p, values)[y]

    def apply(p: PyTree, carry_tm1: PyTree, x: PyTree) -> tuple[PyTree, jax.Array]:
        """The library's view: one program, in which F and g share what they share."""
        values = run(state.lines, p, named(carry_tm1, x))
        values |= {key: values[leaf] for key, leaf in zip(keys, new, strict=True)}
        return pack([values[key] for key in keys]), run(output.lines, p, values)[y]

    carry = pack([jnp.asarray(0.5 * rng.standard_normal((BATCH, *shape))) for shape in shapes])
    params = {key: jnp.asarray(value) for key, value in params.items()}
    sizes = " ".join(f"{key}{list(shape)}" for key, shape in {**inputs, **old}.items())
    text = [f"{name}: {sizes}", *(f"    {line}" for line in state.lines)]
    text += [f"    {key} = {leaf}" for key, leaf in zip(keys, new, strict=True)]
    text += [*(f"    {line}" for line in output.lines), f"    y = {y}"]
    pair = Pair(carry=carry_fn, output=output_fn)
    cell = Cell(lambda key, x: (params, carry), apply)
    out = jax.ShapeDtypeStruct(output.shapes[y], jnp.float64)
    return Grown(cell, params, carry, {(): pair}, out, text)
