"""Parameters of a network's Flax nodes into and out of a whole Flax model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import Cell, Graph, PyTree, Vertex, assemble, graph_of, select
from deepeprop_jax.network.nnx import NnxStep, own_params

Paths = Mapping[str, str | Sequence[str]]


def params_from_linen(network: Any, params: PyTree, variables: PyTree, paths: Paths | None = None) -> PyTree:
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
    graph = _graph(network)
    model = _model(variables)
    values = [select(params, vertex.path) for vertex in graph.nodes]
    for index, places in _places(graph, values, model, paths).items():
        parts = [_at(model, place) for place in places]
        if graph.nodes[index].depth is not None:
            parts = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)]
        like = values[index]["params"]
        values[index] = {"params": jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(parts[0]))}
    return assemble(graph, values)


def params_to_linen(network: Any, params: PyTree, variables: PyTree, paths: Paths | None = None) -> PyTree:
    """The variables of a Linen model with the parameters of a network of its steps in their places.

    The inverse of ``params_from_linen``, with the same arguments; what belongs to no node stays as it is.

    Returns:
      New variables in the structure of ``variables``, for ``model.apply``.

    Raises:
      ValueError: as ``params_from_linen``.
    """
    graph = _graph(network)
    model = _model(variables)
    values = [select(params, vertex.path) for vertex in graph.nodes]
    found: dict[tuple[str, ...], Any] = {}
    for index, places in _places(graph, values, model, paths).items():
        for layer, place in enumerate(places):
            leaves = jax.tree.leaves(values[index]["params"])
            if graph.nodes[index].depth is not None:
                leaves = [leaf[layer] for leaf in leaves]
            found[place] = jax.tree.unflatten(jax.tree.structure(_at(model, place)), leaves)
    inside = _replaced(model, (), found)
    return _with(variables, "params", inside) if "params" in variables else inside


def params_from_nnx(network: Any, params: PyTree) -> PyTree:
    """``params`` with those of the NNX nodes read anew from the instances that the network was built of.

    ``network.init`` gives the parameters that they had when the network was built; this, those that they have now.

    Args:
      network: the network, or its learner.
      params: parameters of the network; nodes that are no NNX instances keep theirs.

    Raises:
      ValueError: the network holds no instance of an NNX module.
    """
    graph = _graph(network)
    steps = _instances(graph)
    values = [select(params, vertex.path) for vertex in graph.nodes]
    for index, step in steps.items():
        values[index] = own_params(step.module)
    return assemble(graph, values)


def params_to_nnx(network: Any, params: PyTree) -> None:
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
    graph = _graph(network)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "params_to_nnx writes values into modules. Return params from the jitted function and call it outside."
        )
    pairs = []
    for index, step in _instances(graph).items():
        vertex = graph.nodes[index]
        new = select(params, vertex.path)
        own = nnx.state(step.module, nnx.Param)
        if _shapes(new) != _shapes(own):
            raise ValueError(
                f"The params of node '{vertex.name}' are not those of its module {step.name}: needed "
                f"{_shapes(own)[1]}, seen {_shapes(new)[1]}. Give the params of this network."
            )
        pairs.append((step.module, new))
    for module, new in pairs:
        # Copies: a caller may donate its params, and the module's would go with them.
        nnx.update(module, jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), new))


def _graph(network: Any) -> Graph:
    of_learner = getattr(network, "network", None)  # which no Flax module or function of a user has as a ``Cell``
    return graph_of(as_cell(of_learner if isinstance(of_learner, Cell) else network))


def _instances(graph: Graph) -> dict[int, NnxStep]:
    applies = {index: vertex.cell.apply for index, vertex in enumerate(graph.nodes)}
    steps = {i: step for i, step in applies.items() if isinstance(step, NnxStep) and step.module is not None}
    if not steps:
        raise ValueError(
            "The network holds no instance of an NNX module. Build it of instances, e.g. "
            "stack(nnx.GRUCell(5, 4, rngs=nnx.Rngs(0))); for a factory's module, nnx.update(module, params)."
        )
    return steps


def _shapes(tree: PyTree) -> tuple[Any, Any]:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _model(variables: PyTree) -> Mapping:
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"The variables of a Linen model are a dict {{'params': ...}}; seen {type(variables).__name__}."
        )
    return variables.get("params", variables)


def _at(model: Mapping, place: tuple[str, ...]) -> PyTree:
    part: Any = model
    for key in place:
        if not isinstance(part, Mapping) or key not in part:
            raise ValueError(f"The model has no parameters at '{'/'.join(place)}'; it has {_listed(model)}.")
        part = part[key]
    return part


def _with(tree: Mapping, key: str, value: Any) -> Any:
    return _of_type(tree, {**tree, key: value})


def _replaced(tree: Any, place: tuple[str, ...], found: Mapping[tuple[str, ...], Any]) -> Any:
    if place in found:
        return found[place]
    if not isinstance(tree, Mapping):
        return tree
    return _of_type(tree, {key: _replaced(part, (*place, key), found) for key, part in tree.items()})


def _of_type(tree: Any, items: dict) -> Any:
    """A dict, or a FrozenDict, as ``tree`` is one."""
    return type(tree)(items)


def _parts(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        yield place, tree
        for key, part in tree.items():
            yield from _parts(part, (*place, key))


def _listed(model: Mapping) -> list[str]:
    return ["/".join(place) for place, _ in _parts(model) if place]


def _named_shapes(tree: PyTree, lead: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes by name: a FrozenDict and a dict of the same names are the same. ``lead`` axes in front are left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(key, "key", key)) for key in path): jnp.shape(leaf)[lead:] for path, leaf in leaves}


def _places(
    graph: Graph, values: Sequence[PyTree], model: Mapping, paths: Paths | None
) -> dict[int, tuple[tuple[str, ...], ...]]:
    """For each Linen node with parameters, the places of its layers in the model."""
    paths = {} if paths is None else paths
    linen = {i: v for i, v in enumerate(values) if isinstance(v, Mapping) and set(v) == {"params"}}
    unknown = sorted(set(paths) - {graph.nodes[i].name for i in linen})
    if unknown or not linen:
        raise ValueError(
            f"paths names {unknown}; the network's Linen nodes with parameters are "
            f"{[graph.nodes[i].name for i in linen]}."
        )
    needed = {i: _named_shapes(v["params"], int(graph.nodes[i].depth is not None)) for i, v in linen.items()}
    found: dict[int, tuple[tuple[str, ...], ...]] = {}
    for index in linen:
        vertex = graph.nodes[index]
        if vertex.name in paths:
            found[index] = _given(vertex, paths[vertex.name], needed[index], model)
    # The largest first: a Dense inside a GRU is no place for a Dense of its own.
    for index in sorted(set(linen) - set(found), key=lambda i: -len(needed[i])):
        taken = [place for places in found.values() for place in places]
        found[index] = (_only(graph.nodes[index], needed[index], model, taken),)
    every = [place for places in found.values() for place in places]
    for number, place in enumerate(every):
        for other in every[number + 1 :]:
            if _overlap(place, other):
                raise ValueError(f"Two nodes are given the same part of the model, '{'/'.join(place)}'.")
    return found


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return a[: len(b)] == b[: len(a)]


def _given(vertex: Vertex, given: str | Sequence[str], needed: dict, model: Mapping) -> tuple[tuple[str, ...], ...]:
    names = [given] if isinstance(given, str) else list(given)
    if len(names) != (vertex.depth or 1):
        raise ValueError(f"Node '{vertex.name}' has {vertex.depth or 1} layers, and {len(names)} paths: {names}.")
    places = tuple(tuple(key for key in name.split("/") if key) for name in names)
    for place in places:
        seen = _named_shapes(_at(model, place))
        if seen != needed:
            raise ValueError(
                f"Node '{vertex.name}' needs parameters {needed}; the model has, at '{'/'.join(place)}', {seen}."
            )
    return places


def _only(vertex: Vertex, needed: dict, model: Mapping, taken: list[tuple[str, ...]]) -> tuple[str, ...]:
    fitting = [
        place
        for place, part in _parts(model)
        if _named_shapes(part) == needed and not any(_overlap(place, other) for other in taken)
    ]
    if len(fitting) == 1 and vertex.depth is None:
        return fitting[0]
    listed = ["/".join(place) for place in fitting]
    if fitting:
        example = tuple(listed[: vertex.depth]) if vertex.depth is not None else listed[0]
        raise ValueError(
            f"Node '{vertex.name}' fits several parts of the model, {listed}. Say which: paths={{{vertex.name!r}: "
            f"{example!r}}}."
        )
    raise ValueError(
        f"Node '{vertex.name}' needs parameters {needed}, and no part of the model that is left has them. "
        f"It has {_named_shapes(model)}."
    )
