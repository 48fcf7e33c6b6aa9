"""A NIR graph while it is made: its nodes by name, its edges, and what one node of a network becomes in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from deepeprop_jax.network.cell import INPUT, PyTree

Array = np.ndarray


class Source(NamedTuple):
    """What a node takes in: one output, or one part of several that are concatenated.

    Attributes:
      names: NIR nodes whose outputs are summed, as NIR sums what enters a node.
      size: length of the vector; None for the external input, where nothing has told it yet.
    """

    names: tuple[str, ...]
    size: int | None


class Site(NamedTuple):
    """A node of a network, for the function that writes it in NIR's words.

    Attributes:
      name: of the node, for NIR.
      shown: of the node, for messages.
      params: its parameters, those of the library's own cells as NumPy arrays.
      arguments: those of the constructor that made its cell.
      sources: what enters, in the order in which it is concatenated.
    """

    name: str
    shown: str
    params: PyTree
    arguments: Mapping[str, Any]
    sources: tuple[Source, ...]


class Leak(NamedTuple):
    """A leaky integrator of NIR, τ dv/dt = (v_leak - v) + R I, that takes a cell's steps, v_t = α v_{t-1} + inflow I.

    Attributes:
      tau: NIR's τ, in the unit of ``to_nir``'s dt.
      r: NIR's R.
      inflow: what one unit of I adds to v in a step, 1 - α times R.
    """

    tau: float
    r: float
    inflow: float


def refusal(shown: str, what: str, remedy: str) -> ValueError:
    """The error for what NIR has no word for."""
    return ValueError(f"Node '{shown}' cannot be written in NIR: {what}. {remedy}")


class Draft:
    """Nodes and edges so far.

    Attributes:
      nir: the package.
      dtype: of all arrays.
      input_size: length of the external input; None where nothing has told it yet.
    """

    def __init__(self, nir: ModuleType, dt: float, exponential: bool, dtype: np.dtype) -> None:
        self.nir: ModuleType = nir
        self.dtype: np.dtype = dtype
        self.input_size: int | None = None
        self.nodes: dict[str, Any] = {INPUT: None}
        self.edges: list[tuple[str, str]] = []
        self._dt, self._exponential = dt, exponential

    def add(self, name: str, node: Any, sources: Iterable[str] = ()) -> str:
        """Put in a node and the edges that lead to it; the name that it has, which is a new one."""
        while name in self.nodes:
            name += "_"
        self.nodes[name] = node
        self.connect(sources, name)
        return name

    def connect(self, sources: Iterable[str], target: str) -> None:
        """Edges from each of these nodes."""
        self.edges += [(source, target) for source in sources]

    def array(self, leaf: Any) -> Array:
        """A parameter with its values."""
        return np.asarray(leaf).astype(self.dtype)

    def full(self, size: int, value: float) -> Array:
        """One value for each of ``size`` units."""
        return np.full(size, value, self.dtype)

    def li(self, leak: Leak, size: int) -> Any:
        """NIR's leaky integrator, at rest at 0."""
        return self.nir.LI(tau=self.full(size, leak.tau), r=self.full(size, leak.r), v_leak=self.full(size, 0))

    def leak(self, tau: float, dt: float, low_pass: bool) -> Leak:
        """NIR's τ and R for a cell's time constant and step: Euler's step of NIR's equation is then the cell's step.

        One Euler step gives v_t = (1 - dt/τ) v_{t-1} + (dt/τ) R I, so that τ = dt / (1 - α); the exact solution over
        one step, with I held, gives v_t = α v_{t-1} + (1 - α) R I with τ = -dt / ln α. R is 1 where what enters is
        weighted by 1 - α, else 1 / (1 - α), in both.
        """
        entering = -math.expm1(-dt / tau)
        r = 1.0 if low_pass else 1 / entering
        return Leak(self._dt * (tau / dt if self._exponential else 1 / entering), r, entering * r)

    def weigh(self, site: Site, kernel: Array, bias: Array | None = None, end: str = "_input") -> tuple[str, ...]:
        """Nodes whose outputs sum to x W + b, one for each part of what enters; W is (inputs, outputs)."""
        names = []
        sources = self._sized(site, len(kernel))
        rows = np.split(kernel, np.cumsum([source.size for source in sources])[:-1])
        for number, (source, part) in enumerate(zip(sources, rows, strict=True)):
            weight = np.ascontiguousarray(part.T)
            first = bias is not None and number == 0
            node = self.nir.Affine(weight, bias) if first else self.nir.Linear(weight)
            name = f"{site.name}{end}_{number}" if len(sources) > 1 else site.name + end
            names.append(self.add(name, node, source.names))
        return tuple(names)

    def gather(self, site: Site) -> tuple[tuple[str, ...], int]:
        """Nodes whose outputs sum to x as it is, and its length."""
        sources = self._sized(site, None)
        if len(sources) == 1:
            return sources[0].names, int(sources[0].size or 0)
        size = sum(int(source.size or 0) for source in sources)
        return self.weigh(site, np.eye(size, dtype=self.dtype)), size

    def _sized(self, site: Site, total: int | None) -> Sequence[Source]:
        """The sources with all their sizes; the external input's is what the others leave of the total."""
        known = [self.input_size if source.names == (INPUT,) else source.size for source in site.sources]
        missing = known.count(None)
        if missing and total is None:
            raise refusal(
                site.shown,
                "NIR needs the length of the external input, and no weights below say it",
                "Put a Dense layer below it.",
            )
        if missing and total is not None:
            self.input_size = (total - sum(size or 0 for size in known)) // missing
            known = [self.input_size if size is None else size for size in known]
        if total is not None and sum(size or 0 for size in known) != total:
            raise ValueError(
                f"The weights of node '{site.shown}' are for {total} inputs, and {known} enter. Give the params that "
                f"init made for this network."
            )
        return [source._replace(size=size) for source, size in zip(site.sources, known, strict=True)]
