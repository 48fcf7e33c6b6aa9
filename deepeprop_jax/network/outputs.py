"""What a network shows: the outputs of any of its nodes, and leaves of their carries, for losses on hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax

from deepeprop_jax.network.cell import (
    Cell,
    Graph,
    Part,
    PyTree,
    Vertex,
    Wire,
    assemble,
    connect,
    graph_of,
    remade,
    rewired,
    run_node,
    select,
)


class CarryOf(NamedTuple):
    """A part of a node's carry, as ``carry_of`` names it.

    Attributes:
      node: the node's name.
      path: keys and indices that lead to it in the node's carry; () for all of it.
    """

    node: str
    path: tuple[int | str, ...]

    def __str__(self) -> str:
        return ".".join(map(str, (self.node, *self.path)))


def carry_of(node: str, *path: int | str) -> CarryOf:
    """Name a node's new carry h_t, or a part of it, as an output of the network.

    Args:
      node: its name, as in ``network.graph.nodes``; of a stack "0", "1", ...
      *path: keys and indices that lead to a leaf, such as 0 for the potentials of ``lif``; none for the whole carry.
    """
    if not isinstance(node, str):
        raise TypeError(f"carry_of takes a node's name, such as '0'; seen {node!r}.")
    return CarryOf(node, path)


Shown: TypeAlias = str | CarryOf
Outputs: TypeAlias = "Shown | tuple[Shown, ...] | Mapping[str, Shown]"


def with_outputs(network: Cell, outputs: Outputs) -> Cell:
    """The same network, params and carry, with other outputs.

    Args:
      outputs: a node's name or what ``carry_of`` gives, for that alone as output; a tuple of them, or a dict of them by
        names of one's own, for a dict: by node, and ``"node.path"`` for parts of a carry.

    Raises:
      TypeError: something else in ``outputs``.
      ValueError: an unknown node; a part that its carry does not have; the carry of a ``stack(cell, depth=L)``.
    """
    graph = graph_of(network)
    places = {vertex.name: v for v, vertex in enumerate(graph.nodes)}
    wanted = _by_key(outputs)
    carries: dict[int, list[CarryOf]] = {}
    for shown in wanted.values():
        name = shown.node if isinstance(shown, CarryOf) else shown
        if name not in places:
            raise ValueError(f"outputs names the unknown node {name!r}; the network's nodes are {list(places)}.")
        if isinstance(shown, CarryOf):
            if graph.nodes[places[name]].depth is not None:
                raise ValueError(
                    f"The carry of {name!r}, a stack(cell, depth=L), cannot be shown. Write its layers out."
                )
            carries.setdefault(places[name], []).append(shown)

    already = {v for v, vertex in enumerate(graph.nodes) if vertex.shows}
    new_ones = carries.keys() - already

    def value(node: int | str) -> Wire:
        return Part(node, "output") if isinstance(node, int) and node in new_ones else node

    nodes = [
        vertex._replace(
            cell=_showing(vertex, tuple(carries[v])) if v in carries else vertex.cell,
            wire=rewired(vertex.wire, value),
            shows=v in already | new_ones,
        )
        for v, vertex in enumerate(graph.nodes)
    ]

    def wire_of(shown: Shown) -> Wire:
        if isinstance(shown, CarryOf):
            return Part(Part(places[shown.node], "carry"), str(shown))
        return Part(places[shown], "output") if places[shown] in already | new_ones else places[shown]

    wires: dict[str, Wire] = {key: wire_of(shown) for key, shown in wanted.items()}
    alone = isinstance(outputs, str | CarryOf)
    whole = Graph(tuple(nodes), next(iter(wires.values())) if alone else wires)

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        new: list[PyTree] = []
        values: list[PyTree] = []
        for vertex in whole.nodes:
            own = select(params, vertex.path), select(carry, vertex.path)
            carry_t, y = run_node(vertex, *own, connect(vertex.wire, x, values))
            new.append(carry_t)
            values.append(y)
        like = jax.tree.structure(carry)
        return like.unflatten(jax.tree.leaves(assemble(whole, new))), connect(whole.output, x, values)

    return remade(Cell(_init_of(network), apply, whole), with_outputs, network, outputs)


def _by_key(outputs: Outputs) -> dict[str, Shown]:
    if isinstance(outputs, str | CarryOf):
        found: dict[str, Shown] = {"output": outputs}
    elif isinstance(outputs, Mapping):
        found = dict(outputs)
    elif isinstance(outputs, tuple | list):
        found = {str(shown): shown for shown in outputs}
        if len(found) < len(outputs):
            raise ValueError(
                f"outputs has two entries of one name, in {tuple(map(str, outputs))}. Name them in a dict."
            )
    else:
        found = {"outputs": outputs}
    wrong = [shown for shown in found.values() if not isinstance(shown, str | CarryOf)]
    if wrong or not found or not all(isinstance(key, str) for key in found):
        raise TypeError(
            f"outputs must be a node's name, carry_of(node, leaf), a tuple of these, or a dict of these by name; seen "
            f"{outputs!r}."
        )
    return found


def _showing(vertex: Vertex, shown: tuple[CarryOf, ...]) -> Cell:
    """A node's cell with a dict as output: its own one, and parts of its new carry, more than it may show already."""
    cell, name = vertex.cell, vertex.name

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        carry_t, y = cell.apply(params, carry, x)
        output, before = (y["output"], y["carry"]) if vertex.shows else (y, {})
        return carry_t, {"output": output, "carry": before | {str(p): _part(carry_t, name, p.path) for p in shown}}

    return remade(Cell(_init_of(cell), apply), _showing, vertex, shown)


def _init_of(cell: Cell) -> Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]]:
    """Its ``init`` as a function of its own: ``remade`` marks it."""

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        return cell.init(key, x)

    return init


def _part(carry: PyTree, name: str, path: tuple[int | str, ...]) -> PyTree:
    part = carry
    try:
        for key in path:
            if isinstance(key, bool) or hasattr(part, "shape"):  # an array has no parts
                raise KeyError(key)
            part = part[key]
    except (KeyError, IndexError, TypeError) as error:
        leaves = [
            jax.tree_util.keystr(found, simple=True, separator=", ") for found, _ in jax.tree.leaves_with_path(carry)
        ]
        raise ValueError(
            f"carry_of({', '.join(map(repr, (name, *path)))}) names no part of that node's carry, whose leaves are "
            f"{[f'({leaf})' for leaf in leaves]}."
        ) from error
    return part
