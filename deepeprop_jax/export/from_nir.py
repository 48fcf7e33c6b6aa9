"""A graph of the Neuromorphic Intermediate Representation (NIR) as a network, to train it."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.cells.surrogates import DAMPENING, SurrogateFunction, chosen_surrogate, spike
from deepeprop_jax.export.package import nir_package
from deepeprop_jax.network.build import graph as build
from deepeprop_jax.network.cell import INPUT, Cell, PyTree, remade

if TYPE_CHECKING:
    import nir

Edge = tuple[str, str]
TRAINED = {"Affine": ("weight", "bias"), "Linear": ("weight",), "Scale": ("scale",)}
LEAKY = ("LI", "LIF")
THRESHOLD = {"LIF": "v_threshold", "Threshold": "threshold"}


def from_nir(
    graph: nir.NIRGraph,
    *,
    dt: float = 1e-3,
    integration: str = "euler",
    surrogate: SurrogateFunction | None = None,
) -> Cell:
    """A NIR graph, such as ``nir.read`` gives, as a network whose weights are trained.

    ``init`` gives the weights of the graph, whatever the key; potentials start at 0. Affine has the params ``weight``
    (outputs, inputs) and ``bias``, Linear ``weight``, Scale ``scale``; time constants, resistances, thresholds and
    resting potentials are constants. What enters a node is summed.

        LI, LIF      v_t = (1 - s) v_{t-1} + s (v_leak + R I_t)        s = dt / τ, or 1 - exp(-dt / τ)
        LIF          z_t = H(v_t - v_threshold); v_reset stands for v_{t-1} after a spike
        Threshold    H(I_t - threshold)

    A node of the graph is a node of the network. What stands in a cycle is one node together, named after the member
    that leads out; its params are a dict by member. A cycle takes one step: an edge that leads back carries the output
    of the step before. Where a spiking node leads out of all cycles, its edges lead back, so that the carry is that of
    ``lif``: potentials and spikes; else those that do in the order in which nodes are first reached from the input.

    Args:
      graph: one Input, and Affine, Linear, Scale, LI, LIF, Threshold and Output nodes.
      dt: length of a step in the unit of the graph's τ, as for ``to_nir``.
      integration: "euler", or "exponential", the solution of a step whose input is held.
      surrogate: derivative of spikes by (v - v_threshold) / v_threshold; without one that of ``lif``.

    Returns:
      The network. Its output is that of the Output node, or a dict of them by name.

    Raises:
      ImportError: the package nir is not installed.
      ValueError: another kind of node, by its name; several inputs; a node that the input does not reach; a cycle that
        leads out from two members; thresholds that are not above 0; ``dt`` or ``integration`` as for ``to_nir``.

    Reference: as for ``to_nir``.

    >>> from deepeprop_jax import stack
    >>> from deepeprop_jax.cells import leaky_readout, lif
    >>> from deepeprop_jax.export import to_nir
    >>> network = stack(lif(4), leaky_readout(2))
    >>> params, carry = network.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> [node.name for node in from_nir(to_nir(network, params)).graph.nodes]
    ['0_input', '0', '1_input', '1', 'output']
    """
    nir_package("from_nir", dt, integration)
    step = Step(dt, integration == "exponential", chosen_surrogate(surrogate, DAMPENING))
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    inputs = [name for name, kind in kinds.items() if kind == "Input"]
    if len(inputs) != 1:
        raise ValueError(f"from_nir reads graphs with one Input; seen {inputs}.")
    known = {"Input", *COMPUTED}
    for name, kind in kinds.items():
        if kind not in known:
            raise ValueError(f"Node '{name}' of the NIR graph is {kind}; from_nir reads {', '.join(sorted(known))}.")
        lowest = np.min(getattr(graph.nodes[name], THRESHOLD.get(kind, ""), 1.0))
        if not lowest > 0:
            raise ValueError(
                f"Node '{name}' of the NIR graph has a threshold of {lowest}; from_nir needs them above 0."
            )
    order = _order(graph.edges, inputs[0])
    if set(order) != set(kinds):
        raise ValueError(f"The input of the NIR graph does not reach {sorted(set(kinds) - set(order))}.")
    groups = _groups(order[1:], graph.edges)
    home = {inputs[0]: INPUT} | {name: exit for exit, members in groups.items() for name in members}
    nodes: dict[str, tuple[Cell, str | dict[str, str]]] = {}
    for exit, members in groups.items():
        enters = [(source, target) for source, target in graph.edges if target in members and source not in members]
        within = [edge for edge in graph.edges if set(edge) <= set(members)]
        if kinds[exit] in THRESHOLD:
            members = _from_spikes(members, within, exit)
        group = Group({name: graph.nodes[name] for name in members}, tuple(enters), tuple(within), exit, step)
        wire = {_argument(edge): home[edge[0]] for edge in enters}
        nodes[exit] = group_cell(group), wire if len(wire) > 1 else next(iter(wire.values()))
    outputs = tuple(name for name, kind in kinds.items() if kind == "Output")
    return build(nodes, outputs=outputs if len(outputs) > 1 else outputs[0])


class Step(NamedTuple):
    """How a step is taken: its length, whether it is solved exactly, and the derivative of a spike."""

    dt: float
    exponential: bool
    surrogate: SurrogateFunction

    def share(self, tau: np.ndarray) -> np.ndarray:
        """What a potential moves of its way to v_leak + R I in a step."""
        return -np.expm1(-self.dt / tau) if self.exponential else self.dt / tau

    def fires(self, v: jax.Array, threshold: np.ndarray) -> jax.Array:
        """H(v - threshold)."""
        return spike((v - threshold) / threshold, self.surrogate)


class Group(NamedTuple):
    """NIR nodes that are one node of the network: one, or those of a cycle.

    Attributes:
      members: NIR nodes by name, in the order in which they are computed.
      enters: edges from outside.
      within: edges between members.
      exit: the member whose output is the group's.
      step: how a step is taken.
    """

    members: Mapping[str, Any]
    enters: tuple[Edge, ...]
    within: tuple[Edge, ...]
    exit: str
    step: Step

    def leads_back(self, edge: Edge) -> bool:
        """Whether the edge carries the output of the step before."""
        rank = list(self.members)
        return rank.index(edge[0]) >= rank.index(edge[1])


def group_cell(group: Group) -> Cell:
    """A group as a cell: params by member, carry (potentials, last outputs) by member; of a group of one, its own."""
    alone, members = len(group.members) == 1, group.members
    kinds = {name: type(node).__name__ for name, node in members.items()}
    # A LIF's own spikes reset it; others are kept for the edges that lead back.
    kept = {name for name in members if kinds[name] == "LIF"} | {e[0] for e in group.within if group.leads_back(e)}

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params = {
            name: {p: jnp.asarray(getattr(n, p)) for p in TRAINED.get(kinds[name], ())} for name, n in members.items()
        }
        like = jax.tree.leaves(x)[0]

        def zeros(name: str) -> jax.Array:
            size = int(np.asarray(members[name].output_type["output"])[0])
            return jnp.zeros((like.shape[0], size), jnp.result_type(like, *_constants(members[name])))

        carry = ({n: zeros(n) for n in members if kinds[n] in LEAKY}, {n: zeros(n) for n in members if n in kept})
        return params[group.exit] if alone else params, carry if any(carry) else ()

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, jax.Array]:
        potentials, before = carry if carry else ({}, {})
        params = {group.exit: params} if alone else params
        given = x if len(group.enters) > 1 else {_argument(group.enters[0]): x}
        v = dict(potentials)
        y: dict[str, jax.Array] = {}
        for name, node in members.items():
            total = sum(given[_argument(edge)] for edge in group.enters if edge[1] == name) + sum(
                (before if group.leads_back(edge) else y)[edge[0]] for edge in group.within if edge[1] == name
            )
            if kinds[name] in LEAKY:
                v[name] = _potential(group.step, node, v[name], before.get(name), total)
            y[name] = COMPUTED[kinds[name]](group.step, node, params[name], v.get(name, total))
        return ((v, {name: y[name] for name in before}) if carry else ()), y[group.exit]

    return remade(Cell(init, apply), group_cell, group)


def _potential(step: Step, node: Any, v_tm1: jax.Array, z_tm1: jax.Array | None, total: jax.Array) -> jax.Array:
    if type(node).__name__ == "LIF" and z_tm1 is not None:
        v_tm1 = v_tm1 * (1 - z_tm1) + node.v_reset * z_tm1
    share = step.share(node.tau)
    return (1 - share) * v_tm1 + share * (node.v_leak + node.r * total)


COMPUTED: dict[str, Callable[[Step, Any, PyTree, jax.Array], jax.Array]] = {
    "Affine": lambda step, node, params, x: x @ params["weight"].T + params["bias"],
    "Linear": lambda step, node, params, x: x @ params["weight"].T,
    "Scale": lambda step, node, params, x: x * params["scale"],
    "LI": lambda step, node, params, v: v,
    "LIF": lambda step, node, params, v: step.fires(v, node.v_threshold),
    "Threshold": lambda step, node, params, x: step.fires(x, node.threshold),
    "Output": lambda step, node, params, x: x,
}
"""The output of a node, by its kind, of its potential or of what enters it."""


def _constants(node: Any) -> list[np.ndarray]:
    return [value for value in vars(node).values() if isinstance(value, np.ndarray)]


def _argument(edge: Edge) -> str:
    return f"{edge[0]} to {edge[1]}"


def _order(edges: Iterable[Edge], start: str) -> list[str]:
    """Nodes such that only edges that close a cycle lead back: those that are reached from the start, depth first."""
    below: dict[str, list[str]] = {}
    for source, target in edges:
        below.setdefault(source, []).append(target)
    found: list[str] = []
    seen, waiting = {start}, [(start, iter(below.get(start, [])))]
    while waiting:
        name, targets = waiting[-1]
        following = next((target for target in targets if target not in seen), None)
        if following is None:
            found.append(name)
            waiting.pop()
        else:
            seen.add(following)
            waiting.append((following, iter(below.get(following, []))))
    return found[::-1]


def _from_spikes(members: list[str], within: list[Edge], exit: str) -> list[str]:
    """Members such that only edges from the exit lead back; as they were where a cycle does not go through it."""
    below = {name: [source for source, target in within if target == name and source != exit] for name in members}
    try:
        return list(graphlib.TopologicalSorter(below).static_order())
    except graphlib.CycleError:
        return members


def _groups(order: list[str], edges: Iterable[Edge]) -> dict[str, list[str]]:
    """Members of each group, by the one whose output leads out."""
    edges = list(edges)
    below = {name: {t for s, t in edges if s == name} for name in order}
    reach = {name: set(below[name]) for name in order}
    for middle in order:
        for name in order:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups: dict[str, list[str]] = {}
    done: set[str] = set()
    for name in order:
        if name in done:
            continue
        members = [other for other in order if other == name or (other in reach[name] and name in reach[other])]
        done |= set(members)
        exits = [member for member in members if below[member] - set(members)] or members[-1:]
        if len(exits) != 1:
            raise ValueError(
                f"The cycle of {members} leads out from {exits}; from_nir reads cycles with one such node."
            )
        groups[exits[0]] = members
    return groups
