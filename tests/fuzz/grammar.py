"""Random straight-line programs: the writer that grows them, and the table of what they are made of.

A production takes the writer, a size n and the fuel left for its operands, and returns the name of a new value of shape
(n,). To add one, decorate it with ``production``; it is then drawn as often as its weight says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZES = (1, 2, 3, 5, 7)


class Line(NamedTuple):
    """``target = function(*weights, *arguments)``, and how a person reads it."""

    target: str
    function: Callable[..., Any]
    weights: tuple[str, ...]
    arguments: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return f"{self.target} = {self.name}({', '.join((*self.weights, *self.arguments))})"


def run(lines: list[Line], params: Mapping[str, jax.Array], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all names of a program; a name that has its value already keeps it."""
    values = dict(values)
    for line in (line for line in lines if line.target not in values):
        weights, arguments = (params[key] for key in line.weights), (values[key] for key in line.arguments)
        values[line.target] = line.function(*weights, *arguments)
    return values


class Writer:
    """Grows one program over the values that it is offered, sharing its parameters with the other half of a cell."""

    def __init__(
        self, rng: np.random.Generator, params: dict[str, np.ndarray], offered: Mapping[str, tuple], prefix: str
    ):
        self.rng, self.params, self.prefix = rng, params, prefix
        self.shapes = dict(offered)
        self.sources = list(offered)
        self.used: set[str] = set()
        self.lines: list[Line] = []

    def pick(self, options: list) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def size(self) -> int:
        return self.pick(list(SIZES))

    def offer(self, name: str) -> None:
        """Let what follows read a value that has been computed."""
        self.sources.append(name)

    def emit(
        self, name: str, function: Callable[..., jax.Array], *arguments: str, weights: tuple[str, ...] = ()
    ) -> str:
        """Append a line and return the name of its value."""
        shapes = [self.params[key].shape for key in weights] + [self.shapes[key] for key in arguments]
        target = f"{self.prefix}{len(self.lines)}"
        structs = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes]
        self.shapes[target] = jax.eval_shape(function, *structs).shape
        self.used |= set(arguments)
        self.lines.append(Line(target, function, weights, arguments, name))
        return target

    def emit_one_of(self, functions: Mapping[str, Callable[..., jax.Array]], *arguments: str) -> str:
        """Append a line that applies one of the named functions."""
        name = self.pick(list(functions))
        return self.emit(name, functions[name], *arguments)

    def weight(self, shape: tuple[int, ...], scale: float | None = None, reuse: float = 0.25) -> str:
        """A parameter of a shape: a fresh one, or (with probability ``reuse``) one that is in use already."""
        known = [key for key, value in self.params.items() if value.shape == shape]
        if known and self.rng.random() < reuse:
            return self.pick(known)
        key = f"w{len(self.params)}{list(shape)}".replace(" ", "")
        scale = scale or (0.7 if len(shape) == 1 else 0.9 / np.sqrt(shape[-1]))
        self.params[key] = scale * self.rng.standard_normal(shape)
        return key

    def atom(self) -> str:
        """One of the values on offer, as a vector."""
        name = self.pick(self.sources)
        if len(self.shapes[name]) == 1:
            return name
        kind = self.pick(["ravel", "row", "mean"])
        if kind == "row":
            return self.emit("row0", lambda a: a[0], name)
        return self.emit("ravel", jnp.ravel, name) if kind == "ravel" else self.emit("mean0", lambda a: a.mean(0), name)

    def dense(self, size: int, *arguments: str) -> str:
        """tanh of an affine map of the arguments."""
        weights = tuple(self.weight((size, self.shapes[key][0])) for key in arguments)
        bias = self.weight((size,), reuse=0.1)

        def function(b: jax.Array, *rest: jax.Array) -> jax.Array:
            matrices, vectors = rest[: len(weights)], rest[len(weights) :]
            return jnp.tanh(sum((w @ v for w, v in zip(matrices, vectors, strict=True)), b))

        return self.emit("dense", function, *arguments, weights=(bias, *weights))

    def vector(self, size: int, fuel: int) -> str:
        """A bounded value of shape (size,), grown by a random production."""
        if fuel <= 0:
            name = self.atom()
            if self.shapes[name] == (size,) and self.rng.random() < 0.5:
                return self.emit("tanh", jnp.tanh, name)
            return self.dense(size, name, *([self.atom()] if self.rng.random() < 0.4 else []))
        fitting = [item for item in PRODUCTIONS if item.least <= size]
        odds = np.array([item.odds for item in fitting])
        chosen = fitting[int(self.rng.choice(len(fitting), p=odds / odds.sum()))]
        return chosen.grow(self, size, fuel - 1)


class Production(NamedTuple):
    """A rule of the grammar: how it grows, the smallest size that it fits, how often it is drawn."""

    grow: Callable[[Writer, int, int], str]
    least: int
    odds: float


PRODUCTIONS: list[Production] = []


def production(least: int = 1, odds: float = 1.0) -> Callable:
    """Enter a rule into the grammar."""

    def enter(grow: Callable[[Writer, int, int], str]) -> Callable[[Writer, int, int], str]:
        PRODUCTIONS.append(Production(grow, least, odds))
        return grow

    return enter


# ----------------------------------------------------------------------------------------------------------------- dots


@production(odds=3.0)
def _dense(writer: Writer, n: int, fuel: int) -> str:
    return writer.dense(n, writer.vector(writer.size(), fuel))


@production(odds=2.0)
def _dense_of_two(writer: Writer, n: int, fuel: int) -> str:
    return writer.dense(n, writer.atom(), writer.vector(n, fuel))


@production()
def _transposed(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(writer.size(), fuel)
    w = writer.weight((writer.shapes[v][0], n), reuse=0.6)
    return writer.emit("w.T@", lambda w, v: jnp.tanh(w.T @ v), v, weights=(w,))


@production()
def _parameter_ahead(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(writer.size(), fuel)
    m = writer.shapes[v][0]
    weights = (writer.weight((n, m)), writer.weight((m,)))
    return writer.emit("w@(s*v)", lambda w, s, v: jnp.tanh(w @ (s * v)), v, weights=weights)


@production()
def _weight_norm(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(writer.size(), fuel)
    weights = (writer.weight((n, writer.shapes[v][0])), writer.weight((n,)))

    def function(w: jax.Array, scale: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.tanh((w * (scale / jnp.sqrt(jnp.sum(w**2, 1) + 0.1))[:, None]) @ v)

    return writer.emit("weight_norm", function, v, weights=weights)


@production()
def _masked_weight(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(writer.size(), fuel)
    m = writer.shapes[v][0]
    mask = writer.rng.random((n, m)) < 0.6
    mask[0, 0] = True
    return writer.emit("masked@", lambda w, v: jnp.tanh((mask * w) @ v), v, weights=(writer.weight((n, m)),))


@production(least=2)
def _heads(writer: Writer, n: int, fuel: int) -> str:
    heads, width = (n // 2, 2) if n % 2 == 0 else (n, 1)
    v, w = writer.vector(n, fuel), writer.weight((heads, width, width))
    return writer.emit(
        "heads", lambda w, v: jnp.tanh(jnp.einsum("hij,hj->hi", w, v.reshape(heads, width)).ravel()), v, weights=(w,)
    )


@production(least=3)
def _convolution(writer: Writer, n: int, fuel: int) -> str:
    v, kernel = writer.vector(n, fuel), writer.weight((3,))
    return writer.emit("convolve", lambda k, v: jnp.tanh(jnp.convolve(v, k, "same")), v, weights=(kernel,))


@production(odds=0.7)
def _attention(writer: Writer, n: int, fuel: int) -> str:
    query, key, value = writer.vector(n, fuel // 2), writer.vector(2, fuel // 2), writer.atom()
    w = writer.weight((2, writer.shapes[value][0]))
    return writer.emit("outer@", lambda w, q, k, v: jnp.outer(q, k) @ jnp.tanh(w @ v), query, key, value, weights=(w,))


# --------------------------------------------------------------------------------------------------------- element-wise


@production(odds=1.5)
def _scaled(writer: Writer, n: int, fuel: int) -> str:
    return writer.emit("s*", lambda s, v: s * v, writer.vector(n, fuel), weights=(writer.weight((n,)),))


@production(odds=1.5)
def _unary(writer: Writer, n: int, fuel: int) -> str:
    functions = {
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "sin": jnp.sin,
        "softsign": lambda v: v / jnp.sqrt(1 + v**2),
        "gaussian": lambda v: jnp.exp(-(v**2)),
    }
    return writer.emit_one_of(functions, writer.vector(n, fuel))


@production(odds=2.0)
def _binary(writer: Writer, n: int, fuel: int) -> str:
    functions = {
        "mean": lambda a, b: (a + b) / 2,
        "product": lambda a, b: a * b,
        "gate": lambda a, b: jax.nn.sigmoid(3 * a) * b,
        "difference": lambda a, b: jnp.tanh(a - b),
        "ratio": lambda a, b: a / (1 + b**2),
    }
    return writer.emit_one_of(functions, writer.vector(n, fuel // 2), writer.vector(n, fuel - fuel // 2))


@production()
def _where(writer: Writer, n: int, fuel: int) -> str:
    a, b = writer.vector(n, fuel // 2), writer.vector(n, fuel // 2)
    threshold = float(writer.rng.uniform(-0.3, 0.3))
    return writer.emit("where", lambda a, b: jnp.where(a > threshold, b, 0.5 * a * b), a, b)


@jax.custom_jvp
def _spike(v: jax.Array) -> jax.Array:
    return (v > 0.05).astype(v.dtype)


_spike.defjvp(lambda primals, tangents: (_spike(*primals), tangents[0] / (1 + 4 * primals[0] ** 2)))


@jax.custom_vjp
def _straight_through(v: jax.Array) -> jax.Array:
    return jnp.tanh(v)


_straight_through.defvjp(lambda v: (jnp.tanh(v), v), lambda v, ct: (ct * 0.6 * jnp.cos(v),))


@production()
def _surrogate(writer: Writer, n: int, fuel: int) -> str:
    functions = {"custom_jvp": _spike, "custom_vjp": _straight_through}
    return writer.emit_one_of(functions, writer.vector(n, fuel))


# ------------------------------------------------------------------------------------------------------ moving elements


@production(least=2, odds=1.5)
def _concatenate(writer: Writer, n: int, fuel: int) -> str:
    m = int(writer.rng.integers(1, n))
    return writer.emit(
        "concat", lambda a, b: jnp.concatenate([a, b]), writer.vector(m, fuel // 2), writer.vector(n - m, fuel // 2)
    )


@production(odds=1.5)
def _split(writer: Writer, n: int, fuel: int) -> str:
    both = writer.dense(2 * n, writer.vector(writer.size(), fuel))
    return writer.emit("split gates", lambda v: (p := jnp.split(v, 2))[0] * jax.nn.sigmoid(p[1]), both)


@production(odds=1.5)
def _interleaved(writer: Writer, n: int, fuel: int) -> str:
    both = writer.dense(2 * n, writer.vector(writer.size(), fuel))
    return writer.emit("reshape gates", lambda v: (p := v.reshape(n, 2))[:, 0] * jax.nn.sigmoid(p[:, 1]), both)


@production(least=2)
def _permuted(writer: Writer, n: int, fuel: int) -> str:
    order = writer.rng.permutation(n)
    functions = {
        "reverse": lambda v: v[::-1],
        "roll": lambda v: jnp.roll(v, 1),
        "gather": lambda v: v[order],
        "stack": lambda v: jnp.stack([v, -v], 1).ravel()[n // 2 : n // 2 + n],
    }
    return writer.emit_one_of(functions, writer.vector(n, fuel))


@production(least=2, odds=0.5)
def _sorted(writer: Writer, n: int, fuel: int) -> str:
    return writer.emit("sort", jnp.sort, writer.vector(n, fuel))


# -------------------------------------------------------------------------------------------------------- whole vectors


@production(least=3)
def _layer_norm(writer: Writer, n: int, fuel: int) -> str:
    def function(scale: jax.Array, bias: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.tanh(scale * (v - v.mean()) / jnp.sqrt(v.var() + 0.1) + bias)

    return writer.emit(
        "layer_norm", function, writer.vector(n, fuel), weights=(writer.weight((n,)), writer.weight((n,)))
    )


@production(least=2)
def _softmax(writer: Writer, n: int, fuel: int) -> str:
    return writer.emit(
        "softmax", lambda a, b: jax.nn.softmax(2 * a) * b, writer.vector(n, fuel // 2), writer.vector(n, fuel // 2)
    )


@production(least=2)
def _whole(writer: Writer, n: int, fuel: int) -> str:
    functions = {
        "cumsum": lambda v: jnp.cumsum(v) / n,
        "logsumexp": lambda v: v - jax.nn.logsumexp(0.5 * v),
        "centre": lambda v: v - 0.5 * v.mean(),
        "rms_norm": lambda v: v / jnp.sqrt(jnp.mean(v**2) + 0.2),
    }
    return writer.emit_one_of(functions, writer.vector(n, fuel))


@production(least=2, odds=0.7)
def _rotation(writer: Writer, n: int, fuel: int) -> str:
    half = n // 2
    angle = writer.weight((half,))

    def function(angle: jax.Array, v: jax.Array) -> jax.Array:
        turned = lax.complex(v[:half], v[half : 2 * half]) * jnp.exp(1j * angle)
        return jnp.concatenate([turned.real, turned.imag, v[2 * half :]])

    return writer.emit("complex", function, writer.vector(n, fuel), weights=(angle,))


# --------------------------------------------------------------------------------------------------------- control flow


@production()
def _conditional(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(n, fuel)
    weights = (writer.weight((n, n)), writer.weight((n,)))

    def function(w: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
        return lax.cond(v[0] > 0.02, lambda v: jnp.tanh(w @ v), lambda v: s * v, v)

    return writer.emit("cond", function, v, weights=weights)


@production()
def _loop_reused_weight(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(n, fuel)

    def function(w: jax.Array, v: jax.Array) -> jax.Array:
        return lax.scan(lambda s, _: (jnp.tanh(w @ s + v), None), 0.3 * v, None, length=2)[0]

    return writer.emit("scan", function, v, weights=(writer.weight((n, n)),))


@production()
def _loop_over_rows(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(n, fuel)

    def function(rows: jax.Array, v: jax.Array) -> jax.Array:
        last, seen = lax.scan(lambda s, row: (jnp.tanh(row * s + 0.5 * v), s * row), v, rows)
        return last + 0.3 * seen.sum(0)

    return writer.emit("scan rows", function, v, weights=(writer.weight((3, n), scale=0.7),))


@production(odds=0.7)
def _wrapped(writer: Writer, n: int, fuel: int) -> str:
    v = writer.vector(writer.size(), fuel)
    name = writer.pick(["checkpoint", "jit"])
    wrap = {"checkpoint": jax.checkpoint, "jit": jax.jit}[name]
    return writer.emit(name, wrap(lambda w, v: jnp.tanh(w @ v)), v, weights=(writer.weight((n, writer.shapes[v][0])),))
