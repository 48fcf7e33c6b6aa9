"""NIR graphs run in NumPy by NIR's own equations; knows nothing of the library.

τ dv/dt = (v_leak - v) + R I    LI: y = v    LIF: y = H(v - v_threshold), then v := v_reset where there is a spike
W I    W I + b    s I    H(I - threshold)

What enters a node is summed. A cycle takes one step: an edge that leads back, in the order in which nodes are first
reached from the input, carries the output of the step before. Potentials start at 0.
"""

from __future__ import annotations

import nir
import numpy as np

Traces = dict[str, np.ndarray]


def order_of(graph: nir.NIRGraph) -> list[str]:
    """Nodes such that all edges but those that close a cycle lead forward: depth first from the input, reversed."""
    below = {name: [target for source, target in graph.edges if source == name] for name in graph.nodes}
    found: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for target in below[name]:
            if target not in seen:
                visit(target)
        found.append(name)

    visit("input")
    assert seen == set(graph.nodes), set(graph.nodes) - seen
    return found[::-1]


def simulate(graph: nir.NIRGraph, xs: np.ndarray, dt: float, *, exact: bool = False) -> tuple[Traces, Traces]:
    """Outputs and potentials, before a reset, of every node; (time, batch, size).

    Args:
      xs: (time, batch, size).
      dt: length of a step.
      exact: the solution over a step with its current held, in place of Euler's step.
    """
    order = order_of(graph)
    rank = {name: place for place, name in enumerate(order)}
    above = {name: [source for source, target in graph.edges if target == name] for name in order}
    steps, batch, _ = xs.shape
    sizes = {name: int(np.asarray(node.output_type["output"])[0]) for name, node in graph.nodes.items()}
    y = {name: np.zeros((batch, size)) for name, size in sizes.items()}
    v = {name: np.zeros((batch, sizes[name])) for name, n in graph.nodes.items() if isinstance(n, nir.LI | nir.LIF)}
    outputs: Traces = {name: np.zeros((steps, batch, size)) for name, size in sizes.items()}
    potentials: Traces = {name: np.zeros((steps, batch, sizes[name])) for name in v}
    for t in range(steps):
        y_tm1, y = y, {}
        for name in order:
            node = graph.nodes[name]
            entering = [(y if rank[source] < rank[name] else y_tm1)[source] for source in above[name]]
            total = sum(entering) if entering else xs[t]
            if isinstance(node, nir.LI | nir.LIF):
                share = 1 - np.exp(-dt / node.tau) if exact else dt / node.tau
                v[name] = v[name] + share * (node.v_leak - v[name] + node.r * total)
                potentials[name][t] = v[name]
                y[name] = v[name]
                if isinstance(node, nir.LIF):
                    y[name] = (v[name] > node.v_threshold).astype(float)
                    v[name] = np.where(y[name] > 0, node.v_reset, v[name])
            elif isinstance(node, nir.Affine | nir.Linear):
                y[name] = total @ node.weight.T + getattr(node, "bias", 0)
            elif isinstance(node, nir.Scale):
                y[name] = total * node.scale
            elif isinstance(node, nir.Threshold):
                y[name] = (total > node.threshold).astype(float)
            else:
                assert isinstance(node, nir.Input | nir.Output), node
                y[name] = total
            outputs[name][t] = y[name]
    return outputs, potentials
