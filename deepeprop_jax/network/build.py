"""Build networks: ``stack``, ``graph``, and what counts as a cell."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from deepeprop_jax.network.called import kind_of, refuse_other_libraries
from deepeprop_jax.network.cell import INPUT, Cell, Graph, PyTree, Vertex, Wire, connect, remade, rewired, run_node
from deepeprop_jax.network.linen import linen_cell
from deepeprop_jax.network.nnx import check_nothing_is_shared, nnx_cell
from deepeprop_jax.network.outputs import CarryOf, Outputs, with_outputs
from deepeprop_jax.network.plain_function import function_cell

Parents = str | tuple[str, ...] | Mapping[str, str]


def as_cell(network: object) -> Cell:
    """Anything that ``deep_eprop``, ``stack`` and ``graph`` accept, as a ``Cell``.

    Args:
      network: a ``Cell``, a Flax Linen module, an instance of a Flax NNX module, a plain function
        ``(params, carry, x) -> (carry, y)`` or an activation ``x -> y``, each written for one example.

    Raises:
      TypeError: for anything else, with what to do instead.
      ValueError: for a module that runs over a whole sequence, or is no pure function of params, carry and x.
    """
    if isinstance(network, Cell):
        return network
    if issubclass(kind_of(network), nn.Module):
        return linen_cell(network)
    if issubclass(kind_of(network), nnx.Module):
        return nnx_cell(network)
    refuse_other_libraries(network)
    owner = getattr(network, "__self__", None)
    if isinstance(owner, nn.Module | nnx.Module):
        method = getattr(network, "__name__", "method")
        raise TypeError(
            f"Seen the method {method} of a {type(owner).__name__}; needed the module itself: pass module in place of "
            f"module.{method}."
        )
    if owner is not None:
        refuse_other_libraries(owner)
    if not inspect.isclass(network) and callable(network):
        return function_cell(network)
    name = kind_of(network).__name__
    what = f"the class {name}" if inspect.isclass(network) else f"an object of type {name}"
    layers = " Layers in a list or tuple: stack(*layers)." if type(network) in (list, tuple) else ""
    raise TypeError(
        f"Seen {what}; needed a Cell, a Flax module instance such as nn.GRUCell(features=64), a function "
        f"(params, carry, x) -> (carry, y), or an activation x -> y such as nn.relu.{layers}"
    )


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Name what was done where it fails."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {error}") from error


def _init_node(name: str, cell: Cell, key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
    shapes = jax.tree.map(jnp.shape, x)
    with _named(f"Node '{name}' could not be initialised on an input of shape {shapes} (batch first)"):
        return cell.init(key, x)


def _output_like(name: str, cell: Cell, params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
    """Zeros of the shape of a cell's batched output, to initialise the cells above it."""
    shapes = jax.tree.map(jnp.shape, x)
    with _named(f"Node '{name}' could not be applied to the input of shape {shapes} (batch first)"):
        _, y = jax.eval_shape(jax.vmap(cell.apply, in_axes=(None, 0, 0)), params, carry, x)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), y)


def _splice(nodes: list[Vertex], key: int | str, cell: Cell, source: Wire) -> Wire:
    """Append the nodes of ``cell`` (one, or those of a nested network) and return the wire of its output."""
    if cell.graph is None:
        nodes.append(Vertex(str(key), (key,), cell, source))
        return len(nodes) - 1
    offset = len(nodes)

    def moved(wire: Wire) -> Wire:
        return rewired(wire, lambda node: source if isinstance(node, str) else offset + node)

    for vertex in cell.graph.nodes:
        name = f"{key}/{vertex.name}" if vertex.path else str(key)
        nodes.append(vertex._replace(name=name, path=(key, *vertex.path), wire=moved(vertex.wire)))
    return moved(cell.graph.output)


def stack(*cells: object, depth: int | None = None, outputs: Outputs | None = None) -> Cell:
    """A network of layers, each fed by the output of the one below.

    ``stack(a, b, c)`` takes cells, Flax modules, plain functions, activations and nested networks; params and carry are
    tuples in layer order, nested as the cells are; an activation's are ``()``.

    ``stack(cell, depth=L)`` is L identical layers whose output is shaped as their input: params have a leading axis L,
    the carry (batch, L, ...), and the compiled program contains one layer, whatever L is.

    ``outputs`` names what the network shows in place of the last layer's output: layers ("0", "1", ...), and by
    ``carry_of`` parts of their carries. One of them as it is, a tuple or a dict of them as a dict.

    Raises:
      ValueError: no cells; ``depth`` below 1, with several cells, or around a nested network or an NNX instance; nodes
        that share NNX parameters.
      TypeError: something that is not a cell.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> network = stack(nn.GRUCell(features=4), nn.Dense(2))
    >>> params, carry = network.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry, y = jax.vmap(network.apply, in_axes=(None, 0, 0))(params, carry, jnp.zeros((3, 5)))
    >>> y.shape
    (3, 2)
    """
    if not cells:
        raise ValueError("stack() needs at least one cell.")
    layers = [as_cell(cell) for cell in cells]
    if outputs is not None:
        return with_outputs(stack(*layers, depth=depth), outputs)
    if depth is not None:
        return _deep(layers, depth)
    nodes: list[Vertex] = []
    wire: Wire = INPUT
    for index, layer in enumerate(layers):
        wire = _splice(nodes, index, layer, wire)
    check_nothing_is_shared(nodes)

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params, carries = [], []
        for index, (layer, layer_key) in enumerate(zip(layers, jax.random.split(key, len(layers)), strict=True)):
            layer_params, carry = _init_node(str(index), layer, layer_key, x)
            params.append(layer_params)
            carries.append(carry)
            if index < len(layers) - 1:
                x = _output_like(str(index), layer, layer_params, carry, x)
        return tuple(params), tuple(carries)

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        new = []
        for layer, layer_params, layer_carry in zip(layers, params, carry, strict=True):
            carry_t, x = layer.apply(layer_params, layer_carry, x)
            new.append(carry_t)
        return tuple(new), x

    return remade(Cell(init, apply, Graph(tuple(nodes), wire)), stack, *layers)


def _deep(layers: list[Cell], depth: int) -> Cell:
    if len(layers) != 1 or isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(
            f"stack(cell, depth=L) takes one cell and an integer L >= 1; seen {len(layers)} cells and depth={depth!r}."
        )
    (layer,) = layers
    if layer.graph is not None:
        raise ValueError(
            "stack(cell, depth=L) repeats one cell, and was given a network of cells. Write stack(*[network] * L)."
        )
    vertex = Vertex("layers", (), layer, INPUT, depth)
    check_nothing_is_shared([vertex])

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params, carry = jax.vmap(lambda layer_key: layer.init(layer_key, x))(jax.random.split(key, depth))
        return params, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), carry)

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        return run_node(vertex, params, carry, x)

    return remade(Cell(init, apply, Graph((vertex,), 0)), stack, layer, depth=depth)


def graph(nodes: Mapping[str, tuple[object, Parents]], *, outputs: Outputs) -> Cell:
    """A network as a directed acyclic graph: ``{name: (cell, parents)}``.

    ``parents`` is a name, a tuple of names (their outputs reach the cell concatenated on the last axis), or a dict
    {argument name: parent name} (the cell's x is then a dict). ``"input"`` names the external input. Params and carry
    are dicts by node name. One name as ``outputs`` gives that node's output; a tuple gives a dict by name. In place of
    a name, ``carry_of(name, leaf)`` gives a part of that node's carry; a dict gives them names of your own.

    Top-down feedback within a step is a cycle; it belongs inside one node.

    Raises:
      ValueError: an unknown name, a cycle, a name that is empty, "input" or contains "/"; nodes that share NNX
        parameters.
      TypeError: something that is not a cell.

    >>> import flax.linen as nn
    >>> network = graph({"low": (nn.GRUCell(features=4), "input"),
    ...                  "high": (nn.GRUCell(features=4), ("input", "low"))}, outputs=("low", "high"))
    >>> [node.name for node in network.graph.nodes]
    ['low', 'high']
    """
    if not isinstance(nodes, Mapping) or not nodes:
        raise ValueError(f"graph() needs a non-empty dict {{name: (cell, parents)}}; seen {nodes!r}.")
    cells, wires = {}, {}
    for name, spec in nodes.items():
        if not isinstance(name, str) or not name or name == INPUT or "/" in name:
            raise ValueError(f"A node's name is a non-empty string without '/', and not 'input'; seen {name!r}.")
        if not isinstance(spec, tuple) or isinstance(spec, Cell) or len(spec) != 2:
            raise ValueError(f"Node '{name}' needs a pair (cell, parents); seen {spec!r}.")
        cells[name], wires[name] = as_cell(spec[0]), spec[1]
        named = _names(wires[name])
        if not named:
            raise ValueError(f"Node '{name}' has no parents; name 'input' or another node.")
        unknown = [p for p in named if p != INPUT and p not in nodes]
        if unknown:
            raise ValueError(f"Node '{name}' names the unknown parent {unknown[0]!r}; known are {['input', *nodes]}.")
    if not isinstance(outputs, str) and (isinstance(outputs, Mapping | CarryOf) or not all(map(_is_name, outputs))):
        return with_outputs(graph(nodes, outputs=next(iter(nodes))), outputs)
    out_names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not out_names or any(name not in nodes for name in out_names):
        raise ValueError(f"outputs={outputs!r} must name one or several of the nodes {list(nodes)}.")
    pick: Parents = outputs if isinstance(outputs, str) else {name: name for name in out_names}

    order = _topological_order({name: [p for p in _names(wire) if p != INPUT] for name, wire in wires.items()})
    vertices: list[Vertex] = []
    outs: dict[str, Wire] = {INPUT: INPUT}
    for name in order:
        outs[name] = _splice(vertices, name, cells[name], _resolve(wires[name], outs))
    check_nothing_is_shared(vertices)
    places: dict[str, Wire] = {INPUT: INPUT, **{name: index for index, name in enumerate(order)}}

    def joined(name: str, x: PyTree, values: list[PyTree]) -> PyTree:
        with _named(f"Node '{name}'"):
            return connect(_resolve(wires[name], places), x, values)

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params, carries = {}, {}
        values: list[PyTree] = []
        for name, node_key in zip(order, jax.random.split(key, len(order)), strict=True):
            u = joined(name, x, values)
            params[name], carries[name] = _init_node(name, cells[name], node_key, u)
            values.append(_output_like(name, cells[name], params[name], carries[name], u))
        return params, carries

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        new: dict[str, PyTree] = {}
        values: list[PyTree] = []
        for name in order:
            new[name], y = cells[name].apply(params[name], carry[name], joined(name, x, values))
            values.append(y)
        return new, connect(_resolve(pick, places), x, values)

    remaking = {name: (cells[name], wires[name]) for name in nodes}
    return remade(Cell(init, apply, Graph(tuple(vertices), _resolve(pick, outs))), graph, remaking, outputs=outputs)


def _is_name(shown: object) -> bool:
    return isinstance(shown, str)


def _names(spec: Parents) -> tuple[str, ...]:
    if isinstance(spec, str):
        return (spec,)
    return tuple(spec.values()) if isinstance(spec, Mapping) else tuple(spec)


def _resolve(spec: Parents, wires: Mapping[str, Wire]) -> Wire:
    """Replace names by wires; one parent in a tuple stands as it is."""
    if not isinstance(spec, str | Mapping) and len(spec) == 1:
        return wires[spec[0]]
    return rewired(spec, lambda name: wires[str(name)])


def _topological_order(below: Mapping[str, list[str]]) -> list[str]:
    order: list[str] = []
    waiting = dict(below)
    while waiting:
        ready = [name for name, parent_names in waiting.items() if all(p in order for p in parent_names)]
        if not ready:
            raise ValueError(
                f"The nodes {sorted(waiting)} form a cycle. Feedback within a step belongs inside one node; feedback "
                f"from the step before belongs in a carry."
            )
        order.append(ready[0])
        del waiting[ready[0]]
    return order
