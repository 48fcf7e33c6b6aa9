"""A network and its parameters as a graph of the Neuromorphic Intermediate Representation (NIR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.export.draft import Draft, Site, Source, refusal
from deepeprop_jax.export.package import nir_package
from deepeprop_jax.export.words import WORDS, Written, dense
from deepeprop_jax.network.build import as_cell
from deepeprop_jax.network.cell import INPUT, Cell, PyTree, Vertex, Wire, call_of, graph_of, select
from deepeprop_jax.network.dense import dense_weights, module_name

if TYPE_CHECKING:
    import nir


def to_nir(network: object, params: PyTree, *, dt: float = 1e-3, integration: str = "euler") -> nir.NIRGraph:
    """A network as a NIR graph, which simulators and neuromorphic chips read: ``nir.write("network.nir", graph)``.

    NIR says what runs in continuous time, τ dv/dt = (v_leak - v) + R I, and leaves the steps to whoever runs it. One
    step of ``dt`` by Euler's method, v_t = v_{t-1} + (dt / τ) (v_leak - v_{t-1} + R I_t), is the cell's own step:

        τ = dt / (1 - α)        R = 1 where what enters is weighted by 1 - α (``low_pass=True``), else 1 / (1 - α)

    What stands for what:

        here                                     in NIR
        nn.Dense, nnx.Linear, feedback_dense     Affine, or Linear without a bias
        leaky_readout                            Affine; LI
        low_pass                                 LI
        lif(reset="zero")                        Linear; LIF
        lif with another reset                   Linear; LI; Threshold; the reset is a weight from the spikes to the LI
        lateral weights                          Linear from the spikes back: a cycle, which takes one step
        alif                                     as lif; LI; Scale from the spikes to the Threshold, which it raises
        concatenated parents                     one Linear each, which NIR sums

    A node keeps its name, with "_" for "/", and what stands around it has the name with an ending (``0_input``,
    ``0_potential``, ``0_recurrent``). NIR has no word for derivatives and none for initial values: surrogates and
    ``detach_reset`` stay behind, and potentials start at 0. Needs the extra ``nir`` (``pip install nir``).

    Args:
      network: of the cells above, by ``stack`` and ``graph``, also nested and with ``depth=L``; or its learner.
      params: its parameters, with values; (..., inputs, outputs) here is (outputs, inputs) in NIR.
      dt: length of a step in the unit of NIR's τ, which most of its readers take as seconds. The cells' own ``tau`` and
        ``dt`` count only by their ratio. Run the graph with this step.
      integration: "euler", or "exponential" for programs that solve a step exactly, v_t = α v_{t-1} + (1 - α) R I_t;
        then τ = -dt / ln α, the cell's own.

    Returns:
      The graph, its arrays in the widest dtype of the parameters (float32 at least), ``dt`` and ``integration`` in its
      metadata. Several outputs are nodes ``output_<name>``.

    Raises:
      ImportError: the package nir is not installed.
      ValueError: a node for which NIR has no word, by its name: a refractory period, ``alif`` with ``reset="zero"``,
        any other cell, module or function, a dict as a node's input, ``carry_of``; ``dt`` that is not above 0; another
        ``integration``; ``params`` of another network.

    Reference: J. E. Pedersen et al., "Neuromorphic intermediate representation: A unified instruction set for
    interoperable brain-inspired computing", Nature Communications 15, 8122 (2024), Table 1 and its equations.

    >>> import flax.linen as nn
    >>> from deepeprop_jax import stack
    >>> from deepeprop_jax.cells import lif
    >>> network = stack(lif(4, recurrent=False, reset="zero"), nn.Dense(2))
    >>> params, carry = network.init(jax.random.key(0), jax.numpy.zeros((3, 5)))
    >>> to_nir(network, params).edges
    [('input', '0_input'), ('0_input', '0'), ('0', '1'), ('1', 'output')]
    """
    package = nir_package("to_nir", dt, integration)
    of_learner = getattr(network, "network", None)
    graph = graph_of(of_learner if isinstance(of_learner, Cell) else as_cell(network))
    draft = Draft(package, dt, integration == "exponential", _widest(params))
    written: list[Written] = []
    for vertex in graph.nodes:
        written.append(_layers(draft, vertex, _own(vertex, params), _sources(vertex.name, vertex.wire, written)))
    _finish(draft, graph.output, written)
    return package.NIRGraph(draft.nodes, draft.edges, metadata={"dt": dt, "integration": integration})


def _own(vertex: Vertex, params: PyTree) -> PyTree:
    try:
        return select(params, vertex.path)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"The params have nothing at node '{vertex.name}'. Give the params that init made for this network."
        ) from error


def _widest(params: PyTree) -> np.dtype:
    """One dtype for all arrays, since its readers may not mix them: that of the parameters, float32 at least."""
    widest = np.dtype(np.float32)
    for leaf in jax.tree.leaves(params):
        widest = np.promote_types(widest, jnp.result_type(leaf))
    return widest


def _sources(shown: str, wire: Wire, written: list[Written]) -> tuple[Source, ...]:
    """What a wire carries, part by part."""
    if isinstance(wire, str):
        return (Source((INPUT,), None),)
    if isinstance(wire, int):
        return (Source(*written[wire]),)
    if isinstance(wire, tuple):
        return tuple(source for part in wire for source in _sources(shown, part, written))
    raise refusal(shown, "what enters is a dict", "Give its parents as a tuple, which concatenates them.")


def _layers(draft: Draft, vertex: Vertex, own: PyTree, sources: tuple[Source, ...]) -> Written:
    """A node, or its layers one after the other where it has depth."""
    name = vertex.name.replace("/", "_")
    if vertex.depth is None:
        return _write(draft, vertex, Site(name, vertex.name, own, {}, sources))
    for layer in range(vertex.depth):
        inside = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own)
        written = _write(draft, vertex, Site(f"{name}_{layer}", vertex.name, inside, {}, sources))
        sources = (Source(*written),)
    return written


def _write(draft: Draft, vertex: Vertex, site: Site) -> Written:
    if vertex.shows:
        raise refusal(
            vertex.name,
            "it shows parts of its carry (carry_of)",
            "Build the network without these outputs; its params are the same.",
        )
    call = call_of(vertex.cell)
    try:
        if call is not None and call.func in WORDS:
            own = site._replace(params=jax.tree.map(draft.array, site.params), arguments=call.keywords)
            return WORDS[call.func](draft, own)
        weights = dense_weights(vertex.cell, site.params)
        if weights is not None:
            kernel, bias = weights
            return dense(draft, site, draft.array(kernel), None if bias is None else draft.array(bias))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"The params of node '{vertex.name}' are not those of its cell ({error!r}). Give the params that init made "
            f"for this network."
        ) from error
    words = ", ".join(["nn.Dense", "nnx.Linear", *(constructor.__name__ for constructor in WORDS)])
    raise refusal(
        vertex.name,
        f"it is {module_name(vertex.cell)}, for which to_nir knows no word",
        f"Known are {words}, and stack and graph of them.",
    )


def _finish(draft: Draft, output: Wire, written: list[Written]) -> None:
    """The nodes where the graph begins and ends."""
    wires = (
        {f"output_{name}": wire for name, wire in output.items()} if isinstance(output, Mapping) else {"output": output}
    )
    for name, wire in wires.items():
        parts = _sources("output", wire, written)
        if len(parts) > 1:
            raise refusal("output", "the network's output is a concatenation", "Give several outputs by name.")
        size = draft.input_size if parts[0].names == (INPUT,) else parts[0].size
        node = draft.nir.Output(output_type={"output": np.array([size])})
        draft.add(name.replace("/", "_"), node, parts[0].names)
    draft.nodes[INPUT] = draft.nir.Input(input_type={"input": np.array([draft.input_size])})
