"""Which nodes a source sees through time in a segment; the others pass on only what outputs owe to their own step."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import numpy as np

from deepeprop_jax.traces.plan import Plan


class Span(NamedTuple):
    """Layers of a node, from ``low`` up to ``high``, that one included not; (0, 1) of a node without depth."""

    node: int
    low: int
    high: int


Kept = frozenset[Span]
"""What a source sees through time: at most one span per node."""


def everything(plan: Plan) -> Kept:
    """All layers of all nodes."""
    return frozenset(Span(v, 0, plan.depth(v)) for v in range(len(plan.nodes)))


def within(kept: Kept, nodes: Container[int]) -> Kept:
    """What of it lies in these nodes."""
    return frozenset(span for span in kept if span.node in nodes)


def nodes_of(kept: Kept) -> list[int]:
    """In order."""
    return sorted(span.node for span in kept)


def kept_by(plan: Plan, k: int, layer: int | None = None) -> Kept:
    """What source k sees through time; of a node with depth one ``layer``, or what any layer sees."""
    if layer is None or plan.hops in (None, 0):
        own = Span(k, 0, plan.depth(k))
    else:
        own = Span(k, layer, min(layer + plan.bands[k] + 1, plan.depth(k)))
    spans = {own}
    for (v, source), pair in plan.pairs.items():
        if source == k:
            mask = np.ones((pair.layers, pair.sources), bool) if pair.mask is None else pair.mask
            place = -1 if layer is None else layer - plan.depth(k)
            high = int(mask[:, place].sum()) if -place <= pair.sources else 0
            spans |= {Span(v, 0, high)} if high else set()
    return frozenset(spans)


class Group(NamedTuple):
    """Layers of a source that see the same through time; layer 0 of a node without depth."""

    layers: list[int]
    kept: Kept


def groups(plan: Plan, k: int, v: int | None = None) -> list[Group]:
    """The layers of source k by what they see.

    Args:
      v: None for the gradient, where each layer is in a group. Else only what the rows of this node's carry have to
        know: where a layer's influence on one of them is kept, so is all on the way within v and within k, which are
        whole spans then; layers without a kept influence on v are in no group.
    """
    if plan.hops in (None, 0) or plan.depth(k) == 1 or v == k:
        return [Group(list(range(plan.depth(k))), kept_by(plan, k))]
    found: dict[Kept, list[int]] = {}
    for layer in range(plan.depth(k)):
        kept = kept_by(plan, k, layer)
        if v is not None:
            if v not in nodes_of(kept):
                continue
            kept = within(kept, set(range(v)) - {k}) | {Span(node, 0, plan.depth(node)) for node in {k, v}}
        found.setdefault(kept, []).append(layer)
    return [Group(layers, kept) for kept, layers in found.items()]
