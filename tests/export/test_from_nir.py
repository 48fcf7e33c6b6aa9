"""NIR graphs as networks: the simulator's spikes, parameters of the graph, and gradients that are BPTT's."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest

from deepeprop_jax import analyse, deep_eprop, stack
from deepeprop_jax.cells import SuperSpike, alif, leaky_readout, lif
from deepeprop_jax.export import from_nir, to_nir
from deepeprop_jax.reference import bptt
from tests.export.nir_simulator import simulate

F64 = jnp.float64
STEPS, BATCH, INPUTS = 20, 3, 5


@pytest.fixture(scope="module")
def read():
    """The graph of a network with both kinds of spiking unit, a cycle around each but one, and what it does here."""
    layers = (
        alif(7, tau=8.0, tau_adaptation=12.0, threshold=0.4, beta=0.3, param_dtype=F64),
        lif(5, tau=8.0, threshold=0.3, reset="zero", param_dtype=F64),
        lif(4, tau=8.0, threshold=0.3, reset="zero", recurrent=False, param_dtype=F64),
        leaky_readout(2, param_dtype=F64),
    )
    xs = 0.4 + jax.random.normal(jax.random.key(0), (STEPS, BATCH, INPUTS), F64)
    network = stack(*layers)
    params, _ = network.init(jax.random.key(1), xs[0])
    made = to_nir(network, params)
    again = from_nir(made)
    params, carry = again.init(jax.random.key(2), xs[0])
    return made, again, params, carry, xs


def test_it_makes_the_spikes_of_the_graph(read) -> None:
    made, network, params, carry, xs = read

    def step(carry, x):
        return jax.vmap(network.apply, in_axes=(None, 0, 0))(params, carry, x)

    _, ys = jax.jit(lambda: jax.lax.scan(step, carry, xs))()
    outputs, _ = simulate(made, np.asarray(xs), 1e-3)
    for name in ("0", "1", "2"):
        assert 0.05 < outputs[name].mean() < 0.8, name
    np.testing.assert_allclose(ys, outputs["output"], rtol=0, atol=1e-9)
    assert [node.name for node in network.graph.nodes] == [
        *("0_input", "0", "1_input", "1", "2_input", "2", "3_input", "3", "output")
    ]
    np.testing.assert_array_equal(params["1"]["1_recurrent"]["weight"], made.nodes["1_recurrent"].weight)
    assert set(params["0"]) == {"0", "0_potential", "0_adaptation", "0_raised", "0_recurrent"}


def test_exact_gradients_are_those_of_bptt(read) -> None:
    _, network, params, carry, xs = read
    targets = jnp.ones((STEPS, BATCH, 2), F64)

    def loss_fn(y, target):
        return jnp.sum((y - target) ** 2)

    learner = deep_eprop(network, exact=True)
    run = jax.jit(learner.value_and_grad(loss_fn))
    (loss, _), grads = run(params, learner.init(params, carry, xs[0]), xs, targets)
    (wanted_loss, _), wanted = jax.jit(bptt(network, loss_fn))(params, carry, xs, targets)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-12)
    for leaf, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-9 * float(jnp.linalg.norm(expected)))
    assert float(jnp.linalg.norm(grads["0_input"]["weight"])) > 0


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_a_unit_without_lateral_weights_is_found_element_wise(reset: str) -> None:
    """As ``lif`` is, and its spike takes no trace."""
    x = jnp.zeros((BATCH, INPUTS), jnp.float32)
    network = lif(4, reset=reset, recurrent=False)
    again = from_nir(to_nir(network, network.init(jax.random.key(0), x)[0]))
    report = analyse(again, *again.init(jax.random.key(0), x), x)
    (unit,) = [node for node in report.nodes if node.name == "cell"]
    assert (unit.recurrence, unit.carry_size, len(unit.derived)) == ("element-wise", 4, 1)


def test_integration_surrogate_and_pickle(read) -> None:
    made, _, _, _, xs = read
    exact = from_nir(made, dt=2e-3, integration="exponential", surrogate=SuperSpike())
    params, carry = exact.init(jax.random.key(0), xs[0])
    again = pickle.loads(pickle.dumps(exact))

    def step(carry, x):
        return jax.vmap(again.apply, in_axes=(None, 0, 0))(params, carry, x)

    _, ys = jax.jit(lambda: jax.lax.scan(step, carry, xs))()
    outputs, _ = simulate(made, np.asarray(xs), 2e-3, exact=True)
    np.testing.assert_allclose(ys, outputs["output"], rtol=0, atol=1e-9)


def graph_of(*edges: tuple[str, str], **nodes: nir.NIRNode) -> nir.NIRGraph:
    three = np.array([3])
    ends = {"input": nir.Input({"input": three}), "output": nir.Output({"output": three})}
    return nir.NIRGraph(ends | nodes, list(edges), type_check=False)


def test_cycles_that_do_not_go_through_the_node_that_leads_out() -> None:
    """Two layers that feed each other, one of which feeds itself; and a cycle without spikes."""
    draw = np.random.RandomState(0)
    weights = {f"w{i}": nir.Linear(draw.randn(3, 3)) for i in range(4)}
    filters = {f"v{i}": nir.LI(tau=5e-3 * ONES, r=2 * ONES, v_leak=0.1 * ONES) for i in range(3)}
    spikes = {f"z{i}": nir.Threshold(0.3 * ONES) for i in range(2)}
    low = [("input", "v0"), ("v0", "z0"), ("z0", "w0"), ("w0", "v0"), ("z0", "w1"), ("w1", "v1"), ("v1", "z1")]
    high = [("z1", "w2"), ("w2", "v0"), ("z1", "v2"), ("v2", "w3"), ("w3", "v2"), ("v2", "output")]
    made = graph_of(*low, *high, **weights, **filters, **spikes)
    network = from_nir(made)
    assert [node.name for node in network.graph.nodes] == ["z1", "v2", "output"]
    xs = jnp.asarray(draw.randn(STEPS, BATCH, 3))
    params, carry = network.init(jax.random.key(0), xs[0])

    def step(carry, x):
        return jax.vmap(network.apply, in_axes=(None, 0, 0))(params, carry, x)

    _, ys = jax.jit(lambda: jax.lax.scan(step, carry, xs))()
    outputs, _ = simulate(made, np.asarray(xs), 1e-3)
    assert all(0.05 < outputs[name].mean() < 0.95 for name in spikes)
    np.testing.assert_allclose(ys, outputs["output"], rtol=1e-9)


ONES = np.ones(3)
LI = nir.LI(tau=ONES, r=ONES, v_leak=ONES)
REFUSED = {
    "a kind that is not read": (
        r"Node 'if' of the NIR graph is IF; from_nir reads Affine",
        graph_of(("input", "if"), ("if", "output"), **{"if": nir.IF(r=ONES, v_threshold=ONES)}),
    ),
    "a threshold at 0": (
        "Node 'z'.*threshold of 0.0",
        graph_of(("input", "z"), ("z", "output"), z=nir.Threshold(threshold=0 * ONES)),
    ),
    "two inputs": (r"one Input; seen \['input', 'more'\]", graph_of(more=nir.Input({"input": np.array([3])}))),
    "a node that is not reached": (r"does not reach \['v'\]", graph_of(("input", "output"), v=LI)),
    "a cycle with two exits": (
        r"cycle of \['v', 's'\] leads out from \['v', 's'\]",
        graph_of(*(("input", "v"), ("v", "s"), ("s", "v"), ("v", "output"), ("s", "output")), v=LI, s=nir.Scale(ONES)),
    ),
}


@pytest.mark.parametrize(("message", "graph"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_name(message: str, graph: nir.NIRGraph) -> None:
    with pytest.raises(ValueError, match=message):
        from_nir(graph)
