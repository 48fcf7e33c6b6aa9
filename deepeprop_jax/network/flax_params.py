"""Parameters of a network's Flax nodes into and out of a whole Flax model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from deepeprop_jax.network.cell import Cell, Graph, PyTree, Vertex, assemble, graph_of, select
from deepeprop_jax.network.linen import linen_cell
from deepeprop_jax.network.nnx import NnxStep, copied, nnx_cell, own_params

Paths = Mapping[str, str | Sequence[str]]
Shapes = dict[str, tuple[int, ...]]


def params_from_linen(network: object, params: PyTree, variables: PyTree, paths: Paths | None = None) -> PyTree:
    """The parameters of a Linen model, e.g. of ``nn.RNN(nn.GRUCell(64))`` and a Dense, as those of a network of steps.

    *Shapes*: each Linen node's params ``{"params": tree}`` are that part of the model's parameters which has its
    structure and shapes. Dtypes are the model's. ``params_to_linen`` is the way back.

    Args:
      network: the network (or its learner) whose steps are those of the model.
      params: parameters of the network, as its init makes them; nodes that are no Linen modules keep theirs.
      variables: the model's variables ``{"params": ...}``, or what stands under "params".
      paths: ``{node: path}`` where the part of a node lies, e.g. ``{"0": "RNN_0/cell"}``; L paths for a
        ``stack(cell, depth=L)``. A node that is not named is found by its shapes, if one part alone has them. The names
        are those of ``analyse``: a layer's number, "encoder/0" in a nested network, "cell" for a single cell.

    Raises:
      ValueError: a part that is not there, or of other shapes; several that fit, of which the message lists the paths.

    >>> import flax.linen as nn
    >>> from deepeprop_jax import stack
    >>> model = nn.Sequential([nn.RNN(nn.GRUCell(features=4)), nn.Dense(2)])
    >>> variables = model.init(jax.random.key(1), jnp.zeros((3, 6, 5), jnp.float32))
    >>> network = stack(nn.GRUCell(features=4), nn.Dense(2))
    >>> params, carry = network.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> params = params_from_linen(network, params, variables)
    >>> bool((params[1]["params"]["kernel"] == variables["params"]["layers_1"]["kernel"]).all())
    True
    """
    graph, leaves = _graph(network, linen_cell), _leaves(_model(variables))
    values = [select(params, vertex.path) for vertex in graph.nodes]
    for index, places in _places(graph, values, leaves, paths).items():
        found = [_part(leaves, place) for place in places]
        if graph.nodes[index].depth is not None:
            found = [jax.tree.map(lambda *layers: jnp.stack(layers), *found)]
        values[index] = {"params": _with_leaves(values[index]["params"], found[0])}
    return assemble(graph, values)


def params_to_linen(network: object, params: PyTree, variables: PyTree, paths: Paths | None = None) -> PyTree:
    """The variables of a Linen model with the parameters of a network of its steps in their places.

    The inverse of ``params_from_linen``, with the same arguments; what belongs to no node stays as it is.

    Returns:
      New variables in the structure of ``variables``, for ``model.apply``.

    Raises:
      ValueError: as ``params_from_linen``.
    """
    graph, model = _graph(network, linen_cell), _model(variables)
    leaves = _leaves(model)
    values = [select(params, vertex.path) for vertex in graph.nodes]
    for index, places in _places(graph, values, leaves, paths).items():
        deep = graph.nodes[index].depth is not None
        for layer, place in enumerate(places):
            for name, leaf in _leaves(values[index]["params"]).items():
                own = jax.tree.map(lambda a, layer=layer: a[layer], leaf) if deep else leaf
                leaves[_below(place, name)] = own
    inside = _with_leaves(model, leaves)
    return type(variables)({**variables, "params": inside}) if "params" in variables else inside


def params_from_nnx(network: object, params: PyTree) -> PyTree:
    """``params`` with those of the NNX nodes read anew from the instances that the network was built of.

    ``network.init`` gives the parameters that they had when the network was built; this, those that they have now.

    Args:
      network: the network, or its learner.
      params: parameters of the network; nodes that are no NNX instances keep theirs.

    Raises:
      ValueError: the network holds no instance of an NNX module.
    """
    graph = _graph(network, nnx_cell)
    values = [select(params, vertex.path) for vertex in graph.nodes]
    for index, module in _instances(graph).items():
        values[index] = own_params(module)
    return assemble(graph, values)


def params_to_nnx(network: object, params: PyTree) -> None:
    """Write the parameters of a network into the NNX instances that it was built of.

    A model that holds the instances is thereby updated: with ``stack(model.rnn.cell, model.head)``, ``model`` runs with
    the new parameters. For one module alone this is ``nnx.update(module, params)``.

    Args:
      network: the network, or its learner.
      params: parameters of the network.

    Raises:
      ValueError: inside ``jit``, where params have no values; the network holds no instance of an NNX module, or params
        are not those of the network.

    >>> from deepeprop_jax import stack
    >>> low, high = nnx.GRUCell(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    >>> network = stack(low, nnx.relu, high)
    >>> params, carry = network.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> params_to_nnx(network, jax.tree.map(jnp.zeros_like, params))
    >>> float(jnp.abs(high.kernel[...]).max())
    0.0
    """
    graph = _graph(network, nnx_cell)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "params_to_nnx writes values into modules. Return params from the jitted function and call it outside."
        )
    pairs = []
    for index, module in _instances(graph).items():
        vertex = graph.nodes[index]
        new, own = select(params, vertex.path), nnx.state(module, nnx.Param)
        seen, needed = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (new, own))
        if jax.tree.structure(new) != jax.tree.structure(own) or seen != needed:
            raise ValueError(
                f"The params of node '{vertex.name}' are not those of its module {type(module).__name__}: needed "
                f"{needed}, seen {seen}. Give the params of this network."
            )
        pairs.append((module, new))
    for module, new in pairs:
        nnx.update(module, copied(new))


def _graph(network: object, adapter: Callable[..., Cell]) -> Graph:
    """The nodes of a network, of that of a learner, or of a module alone."""
    of_learner = getattr(network, "network", None)  # which no Flax module of a user has as a ``Cell``
    cell = of_learner if isinstance(of_learner, Cell) else network
    return graph_of(cell if isinstance(cell, Cell) else adapter(cell))


def _instances(graph: Graph) -> dict[int, nnx.Module]:
    applies = {index: vertex.cell.apply for index, vertex in enumerate(graph.nodes)}
    modules = {index: step.module for index, step in applies.items() if isinstance(step, NnxStep)}
    modules = {index: module for index, module in modules.items() if module is not None}
    if not modules:
        raise ValueError(
            "The network holds no instance of an NNX module. Build it of instances, e.g. "
            "stack(nnx.GRUCell(5, 4, rngs=nnx.Rngs(0))); for a factory's module, nnx.update(module, params)."
        )
    return modules


def _model(variables: PyTree) -> Mapping[str, PyTree]:
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"The variables of a Linen model are a dict {{'params': ...}}; seen {type(variables).__name__}."
        )
    return variables.get("params", variables)


def _below(place: str, name: str) -> str:
    return "/".join(filter(None, (place, name)))


def _leaves(tree: PyTree, place: str = "") -> dict[str, PyTree]:
    """What nested dicts hold, by their keys as a/b/c: the same for a dict and a FrozenDict."""
    if not isinstance(tree, Mapping):
        return {place: tree}
    below = (_leaves(part, _below(place, key)) for key, part in tree.items())
    return {name: leaf for leaves in below for name, leaf in leaves.items()}


def _with_leaves(tree: PyTree, leaves: Mapping[str, PyTree], place: str = "") -> PyTree:
    """The inverse of ``_leaves``, in the structure of ``tree``."""
    if not isinstance(tree, Mapping):
        return leaves[place]
    kind: Callable[[dict], PyTree] = type(tree)
    return kind({key: _with_leaves(part, leaves, _below(place, key)) for key, part in tree.items()})


def _part(leaves: Mapping[str, PyTree], place: str) -> dict[str, PyTree]:
    """The leaves below a place, by their names there."""
    start = f"{place}/" if place else ""
    return {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}


def _parts(leaves: Mapping[str, PyTree]) -> list[str]:
    """The places that have leaves below, the whole model, "", first."""
    ends = ((name, end) for name in leaves for end, letter in enumerate(name) if letter == "/")
    return ["", *dict.fromkeys(name[:end] for name, end in ends)]


def _shapes(leaves: Mapping[str, PyTree], lead: int = 0) -> Shapes:
    """Shapes without the ``lead`` axes in front."""
    return {name: jax.tree.map(lambda a: jnp.shape(a)[lead:], leaf) for name, leaf in sorted(leaves.items())}


def _places(
    graph: Graph, values: Sequence[PyTree], leaves: Mapping[str, PyTree], paths: Paths | None
) -> dict[int, list[str]]:
    """For each Linen node with parameters, the places of its layers in the model."""
    paths = {} if paths is None else paths
    needed = {
        index: _shapes(_leaves(values[index]["params"]), int(vertex.depth is not None))
        for index, vertex in enumerate(graph.nodes)
        if isinstance(values[index], Mapping) and set(values[index]) == {"params"}
    }
    names = {index: graph.nodes[index].name for index in needed}
    unknown = sorted(set(paths) - set(names.values()))
    if unknown or not needed:
        raise ValueError(
            f"paths names {unknown}; the network's Linen nodes with parameters are {list(names.values())}."
        )
    found = {
        index: _given(graph.nodes[index], paths[name], needed[index], leaves)
        for index, name in names.items()
        if name in paths
    }
    # The largest first: a Dense inside a GRU is no place for a Dense of its own.
    for index in sorted(set(needed) - set(found), key=lambda index: -len(needed[index])):
        taken = [place for places in found.values() for place in places]
        found[index] = [_only(graph.nodes[index], needed[index], leaves, taken)]
    every = [place for places in found.values() for place in places]
    for number, place in enumerate(every):
        if any(_overlap(place, other) for other in every[number + 1 :]):
            raise ValueError(f"Two nodes are given the same part of the model, '{place}'.")
    return found


def _overlap(a: str, b: str) -> bool:
    return not a or not b or f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")


def _given(vertex: Vertex, given: str | Sequence[str], needed: Shapes, leaves: Mapping[str, PyTree]) -> list[str]:
    places = [place.strip("/") for place in ([given] if isinstance(given, str) else given)]
    if len(places) != (vertex.depth or 1):
        raise ValueError(f"Node '{vertex.name}' has {vertex.depth or 1} layers, and {len(places)} paths: {places}.")
    for place in places:
        seen = _shapes(_part(leaves, place))
        if not seen:
            raise ValueError(f"The model has no parameters at '{place}'; it has {_parts(leaves)[1:]}.")
        if seen != needed:
            raise ValueError(f"Node '{vertex.name}' needs parameters {needed}; the model has, at '{place}', {seen}.")
    return places


def _only(vertex: Vertex, needed: Shapes, leaves: Mapping[str, PyTree], taken: list[str]) -> str:
    free = [place for place in _parts(leaves) if not any(_overlap(place, other) for other in taken)]
    fitting = [place for place in free if _shapes(_part(leaves, place)) == needed]
    if len(fitting) == 1 and vertex.depth is None:
        return fitting[0]
    if fitting:
        example = tuple(fitting[: vertex.depth]) if vertex.depth is not None else fitting[0]
        raise ValueError(
            f"Node '{vertex.name}' fits several parts of the model, {fitting}. Say which: paths={{{vertex.name!r}: "
            f"{example!r}}}."
        )
    raise ValueError(
        f"Node '{vertex.name}' needs parameters {needed}, and no part of the model that is left has them. "
        f"It has {_shapes(leaves)}."
    )
