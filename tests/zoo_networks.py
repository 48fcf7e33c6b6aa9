"""The zoo's topologies: stacks, graphs, nested and deep networks, each with the pairs (F, g) of its nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deepeprop_jax.network.build import graph, stack
from deepeprop_jax.network.cell import Cell
from deepeprop_jax.reference import Pair
from tests.zoo_cells import (
    ZooCell,
    dense,
    gru,
    independent,
    leaky,
    linear_recurrent,
    lstm,
    mgu,
    mlp,
    readout,
    simple,
    spiking,
    squash,
)


class ZooNetwork(NamedTuple):
    """A network of the zoo.

    Attributes:
      name: its key in ``networks()``.
      make: the network.
      cells: the zoo's cell of each node, in the order of ``graph_of(make()).nodes``.
      input_shape: of one example.
      elementwise: every node is element-wise in its carry, so that deep e-prop is exact for the network.
    """

    name: str
    make: Callable[[], Cell]
    cells: tuple[ZooCell, ...]
    input_shape: tuple[int, ...] = (2,)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(cell.pair for cell in self.cells)

    @property
    def elementwise(self) -> bool:
        return all(cell.elementwise for cell in self.cells)

    @property
    def forward_mode(self) -> bool:
        return all(cell.forward_mode for cell in self.cells)


def alone(cell: ZooCell) -> ZooNetwork:
    """One cell as a network of one node."""
    return ZooNetwork(cell.name, cell.make, (cell,), cell.input_shape)


def stacked(name: str, *cells: ZooCell) -> ZooNetwork:
    """Layers on top of each other."""
    return ZooNetwork(name, lambda: stack(*(cell.make() for cell in cells)), cells, cells[0].input_shape)


def sandwich(cell: ZooCell) -> ZooNetwork:
    """A cell with a recurrent layer below and another above it: traces reach it, cross it and start in it.

    Raises:
      ValueError: a cell whose input is not a vector.
    """
    if len(cell.input_shape) != 1:
        raise ValueError(f"{cell.name} takes inputs of shape {cell.input_shape}; a sandwich needs vectors.")
    return stacked(f"sandwich/{cell.name}", leaky(cell.input_shape[0]), cell, simple(2))


def _graph(name: str, nodes: dict[str, tuple[ZooCell, object]], outputs: str | tuple[str, ...]) -> ZooNetwork:
    """A graph whose nodes are given in topological order."""
    cells = tuple(cell for cell, _ in nodes.values())
    spec = {key: (cell.make(), parents) for key, (cell, parents) in nodes.items()}
    return ZooNetwork(name, lambda: graph(spec, outputs=outputs), cells)


def _nested() -> ZooNetwork:
    inner = stacked("inner", simple(3), linear_recurrent(2, 3))
    top = leaky(2)
    nodes = {"encoder": (squash().make(), "input"), "core": (inner.make(), "encoder")}
    nodes["top"] = (top.make(), ("core", "encoder"))
    return ZooNetwork("graph_nested_stack", lambda: graph(nodes, outputs="top"), (squash(), *inner.cells, top))


def _dict_input() -> ZooNetwork:
    """A node that takes its parents as a dict {argument name: parent}."""
    left, right = leaky(3), independent(3)

    def step(params, h, x):
        return left.pair.carry(params, h, 2 * x["gain"] * x["drive"])

    merge = left._replace(name="merge", pair=Pair(step, left.pair.output))
    cell = Cell(lambda key, x: left.make().init(key, x["gain"] * x["drive"]), merge.pair.apply)
    nodes = {"left": (left.make(), "input"), "right": (right.make(), "input")}
    nodes["merge"] = (cell, {"gain": "left", "drive": "right"})
    return ZooNetwork("graph_dict_input", lambda: graph(nodes, outputs="merge"), (left, right, merge))


def _deep(name: str, cell: ZooCell, below: tuple[ZooCell, ...] = (), above: tuple[ZooCell, ...] = ()) -> ZooNetwork:
    """stack(cell, depth=4), alone or between other layers."""

    def make() -> Cell:
        layers = stack(cell.make(), depth=4)
        if not below and not above:
            return layers
        return stack(*(part.make() for part in below), layers, *(part.make() for part in above))

    return ZooNetwork(name, make, (*below, cell, *above), (2,) if below else (3,))


def _deep_below_deep() -> ZooNetwork:
    """Two stack(cell, depth=L), both read by a third node: every layer is another number of hops away."""
    low, high, top = leaky(3), simple(3), leaky(2)

    def make() -> Cell:
        nodes = {"low": (stack(low.make(), depth=3), "input"), "high": (stack(high.make(), depth=2), "low")}
        return graph(nodes | {"top": (top.make(), ("low", "high"))}, outputs="top")

    return ZooNetwork("deep_below_deep", make, (low, high, top), (3,))


def topologies() -> list[ZooNetwork]:
    """Every network of several nodes."""
    elementwise = {"lru": linear_recurrent(3, 2), "indrnn": independent(3)}
    elementwise["lif_no_lateral"] = spiking("lif_no_lateral", recurrent=False)
    towers = [
        stacked(f"tower_{name}_{depth}", *([cell] * depth), dense(2))
        for name, cell in elementwise.items()
        for depth in (1, 2, 3)
    ]
    return [
        stacked("stack_1", gru(3)),
        stacked("stack_2", simple(3), dense(2)),
        stacked("stack_3", gru(3), lstm(2), dense(1)),
        stacked("stack_3_encoder", mlp(3), leaky(5), mgu(2)),
        stacked("stack_3_spiking", spiking("alif", 5), spiking("lif", 3), readout(2)),
        stacked("stack_5", simple(2), squash(), linear_recurrent(3, 2), leaky(1), dense(2)),
        stacked("stack_5_recurrent", leaky(2), independent(3), gru(2), simple(1), leaky(2)),
        *towers,
        _graph("graph_skip", {"low": (gru(3), "input"), "high": (leaky(2), ("low", "input"))}, "high"),
        _graph(
            "graph_diamond",
            {
                "low": (leaky(2), "input"),
                "left": (independent(3), "low"),
                "right": (lstm(2), "low"),
                "top": (simple(2), ("left", "right")),
            },
            "top",
        ),
        _graph("graph_two_outputs", {"low": (gru(3), "input"), "high": (leaky(2), "low")}, ("low", "high")),
        _graph(
            "graph_feed_forward",
            {
                "encoder": (mlp(3), "input"),
                "low": (simple(2), "encoder"),
                "between": (dense(3), ("low", "encoder")),
                "high": (leaky(2), "between"),
                "readout": (dense(1), ("high", "low")),
            },
            "readout",
        ),
        _dict_input(),
        _nested(),
        _deep("depth_4", leaky(3)),
        _deep("depth_4_lstm", lstm(3)),
        _deep("depth_4_between", gru(3), below=(simple(3),), above=(dense(2),)),
        _deep("depth_4_below_recurrent", linear_recurrent(3, 2), below=(dense(3),), above=(leaky(2),)),
        _deep_below_deep(),
    ]
