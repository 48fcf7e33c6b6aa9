"""A cell, and a network of cells as one directed acyclic graph of nodes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

PyTree = Any
Made = TypeVar("Made", bound=PyTree)
Path = tuple[int | str, ...]

INPUT = "input"
"""The name of the external input of a network."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """The output of the node with this index, taken as a constant: its value, and no derivative."""

    node: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What a wire carries under a key, where that is a dict."""

    wire: Wire
    key: str


Wire: TypeAlias = "str | int | Constant | Part | tuple[Wire, ...] | Mapping[str, Wire]"
"""How a node's input is made of the outputs below it; one of

* ``"input"``: the external input of the network,
* an ``int``: the output of the node with that index,
* a ``Constant``: the same without a derivative,
* a ``Part`` of what another wire carries,
* a ``tuple`` of wires: concatenated on the last axis,
* a ``dict`` of wires: a dict with the same keys.
"""


class Vertex(NamedTuple):
    """One node of a network.

    Attributes:
      name: unique name, as error messages and tables print it, e.g. ``"encoder/0"``.
      path: where the node's parameters and carry lie in those of the whole network.
      cell: the node's own cell (its ``graph`` is None).
      wire: how the node's input is made of the outputs below it.
      depth: number of identical layers L where the node is a ``stack(cell, depth=L)``, else None.
      shows: whether the cell's output is a dict of its own output, "output", and of parts of its "carry".
    """

    name: str
    path: Path
    cell: Cell
    wire: Wire
    depth: int | None = None
    shows: bool = False

    def __hash__(self) -> int:
        return hash((self.name, self.path, self.cell, _hashable(self.wire), self.depth, self.shows))


class Graph(NamedTuple):
    """Nodes in topological order (parents first), and how the output of the network is made of theirs."""

    nodes: tuple[Vertex, ...]
    output: Wire

    def __hash__(self) -> int:
        return hash((self.nodes, _hashable(self.output)))

    def keys_at(self, path: Path) -> list[int | str]:
        """How the params (or carries) at a path are nested: by these keys; none where a node's own stand there."""
        inside = [vertex.path for vertex in self.nodes if vertex.path[: len(path)] == path != vertex.path]
        return list(dict.fromkeys(inner[len(path)] for inner in inside))


class Cell(NamedTuple):
    """A recurrent cell (or a whole network of them) as two pure functions.

    It hashes, so that it may be a static argument of ``jax.jit``. It pickles as the call that made it (``stack``,
    ``graph``, ``linen_cell``, ``nnx_cell``, the library's own cells) if what that call was given does: a module's
    functions do; Flax's modules, lambdas and functions inside functions need ``cloudpickle``.

    Attributes:
      init: ``init(key, x) -> (params, carry)`` for ONE step's batch ``x`` of shape (batch, ...), ``xs[0]``;
        the carry comes back with a leading batch axis.
      apply: ``apply(params, carry, x) -> (carry, y)`` for ONE example, without a batch axis, in this order: a cell that
        returns ``(y, carry)`` where both are shaped alike cannot be told from one that is right.
        A feed-forward layer has an empty carry, ``()``.
      graph: the nodes inside, filled in by ``stack`` and ``graph``; None for a single cell.
    """

    init: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    graph: Graph | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return reduced(self)

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, memo: object) -> Cell:
        return self


def remade(made: Made, factory: Callable[..., Made], *args: object, **kwargs: object) -> Made:
    """Let a tuple of closures, which cannot be pickled, be pickled as the call that made it."""
    made.init.made_by = made, functools.partial(factory, *args, **kwargs)
    return made


def call_of(made: PyTree) -> functools.partial[Any] | None:
    """The call that made it, with its arguments; None where ``remade`` has not marked it."""
    original, call = getattr(made.init, "made_by", (None, None))
    return call if original is made else None


def reduced(made: Made) -> tuple[object, ...]:
    """For ``__reduce__``: the call that made it, or its fields."""
    call = call_of(made)
    return (call, ()) if call is not None else (type(made), tuple(made))


def _hashable(wire: Wire) -> Hashable:
    """A wire without dicts, the same for equal wires."""
    if isinstance(wire, Mapping):
        return frozenset((name, _hashable(part)) for name, part in wire.items())
    return tuple(map(_hashable, wire)) if isinstance(wire, tuple) else wire


def rewired(wire: Wire, source: Callable[[int | str], Wire]) -> Wire:
    """A wire with another source in the place of each."""
    if isinstance(wire, str | int):
        return source(wire)
    if isinstance(wire, Constant):
        return wire
    if isinstance(wire, Part):
        return Part(rewired(wire.wire, source), wire.key)
    if isinstance(wire, Mapping):
        return {name: rewired(part, source) for name, part in wire.items()}
    return tuple(rewired(part, source) for part in wire)


def with_constants(graph: Graph, nodes: Collection[int]) -> Graph:
    """The network whose nodes take the outputs of these as constants; a loss on an output itself is left as it is."""

    def source(wire: int | str) -> Wire:
        return Constant(wire) if isinstance(wire, int) and wire in nodes else wire

    return graph._replace(nodes=tuple(v._replace(wire=rewired(v.wire, source)) for v in graph.nodes))


def run_node(vertex: Vertex, params: PyTree, carry: PyTree, u: PyTree) -> tuple[PyTree, PyTree]:
    """One step of one node for one example: (carry, output); of its layers one after the other where it has depth."""
    if vertex.depth is None:
        return vertex.cell.apply(params, carry, u)

    def layer_step(u: PyTree, layer: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        carry_t, y = vertex.cell.apply(layer[0], layer[1], u)
        return y, carry_t

    y, carry_t = jax.lax.scan(layer_step, u, (params, carry), length=vertex.depth)
    return carry_t, y


def graph_of(cell: Cell) -> Graph:
    """The nodes of a network; a single cell is a graph of one node."""
    if cell.graph is not None:
        return cell.graph
    return Graph((Vertex("cell", (), cell, INPUT),), 0)


def parents(wire: Wire) -> tuple[int, ...]:
    """Indices of the nodes whose outputs a wire carries, but for constants, each once, in order of appearance."""
    if isinstance(wire, str | Constant):
        return ()
    if isinstance(wire, int):
        return (wire,)
    if isinstance(wire, Part):
        return parents(wire.wire)
    parts = wire.values() if isinstance(wire, Mapping) else wire
    return tuple(dict.fromkeys(p for part in parts for p in parents(part)))


def connect(wire: Wire, x: PyTree, outputs: Mapping[int, PyTree] | Sequence[PyTree]) -> PyTree:
    """The value that a wire carries: linear in the external input ``x`` and in the nodes' ``outputs``."""
    if isinstance(wire, str):
        return x
    if isinstance(wire, int | Constant):
        return outputs[wire if isinstance(wire, int) else wire.node]
    if isinstance(wire, Part):
        return connect(wire.wire, x, outputs)[wire.key]
    if isinstance(wire, Mapping):
        return {name: connect(part, x, outputs) for name, part in wire.items()}
    values = [connect(part, x, outputs) for part in wire]
    if len(values) == 1:
        return values[0]
    seen = [jax.tree.map(jnp.shape, value) for value in values]
    remedy = "Give the parents as a dict {argument name: parent}"
    for value, shape in zip(values, seen, strict=True):
        if jax.tree.structure(value) != jax.tree.structure(0):
            raise ValueError(
                f"Parents given as a tuple are concatenated, so each must give one array; seen outputs of shapes "
                f"{seen}, of which {shape} is not one array. {remedy} instead."
            )
    if any(len(shape) == 0 or shape[:-1] != seen[0][:-1] for shape in seen):
        raise ValueError(
            f"Parents given as a tuple are concatenated on the last axis, so all other axes must agree; seen shapes "
            f"{seen}. {remedy}, or reshape in a feed-forward cell between."
        )
    return jnp.concatenate(values, axis=-1)


def select(tree: PyTree, path: Path) -> PyTree:
    """The part of a network's params or carry that belongs to the node at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def assemble(graph: Graph, values: list[PyTree]) -> PyTree:
    """The inverse of ``select`` over all nodes: nest per-node values as the user's network is nested."""
    by_path = {vertex.path: value for vertex, value in zip(graph.nodes, values, strict=True)}

    def build(path: Path) -> PyTree:
        keys = graph.keys_at(path)
        if not keys:
            return by_path[path]
        if isinstance(keys[0], int):
            return tuple(build((*path, index)) for index in range(len(keys)))
        return {key: build((*path, key)) for key in keys}

    return build(())
