"""NIR graphs, written to a file and read back, run in a simulator of NIR's equations: spikes and potentials as here."""

from __future__ import annotations

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest
from flax import nnx

from deepeprop_jax import Cell, carry_of, deep_eprop, graph, stack
from deepeprop_jax.cells import alif, feedback_dense, leaky_readout, lif, low_pass, lru
from deepeprop_jax.export import to_nir
from tests.export.nir_simulator import simulate

F64 = jnp.float64
STEPS, BATCH, INPUTS, UNITS = 40, 3, 5, 7
TOLERANCE = 1e-9  # float64; potentials are of order 1, and sums run in another order


def spiking(reset: str, **kwargs) -> Cell:
    return lif(UNITS, reset=reset, tau=8.0, threshold=0.6, param_dtype=F64, **kwargs)


SPIKING = {
    "subtract": spiking("subtract"),
    "subtract_alone": spiking("subtract", recurrent=False, detach_reset=True),
    "subtract_low_pass": lif(UNITS, tau=3.0, dt=0.5, threshold=0.1, low_pass=True, param_dtype=F64),
    "zero": spiking("zero"),
    "zero_alone": spiking("zero", recurrent=False),
    "zero_low_pass": lif(UNITS, tau=3.0, threshold=0.2, reset="zero", low_pass=True, param_dtype=F64),
    "none": spiking("none"),
    "none_alone": spiking("none", recurrent=False),
    "adaptive": alif(UNITS, tau=8.0, tau_adaptation=12.0, beta=0.4, threshold=0.4, param_dtype=F64),
    "adaptive_none": alif(UNITS, tau=8.0, beta=0.3, threshold=0.5, reset="none", recurrent=False, param_dtype=F64),
}


def run(network: Cell, params: object, carry: object, xs: jax.Array) -> tuple[object, object]:
    """Carries and outputs of every step, as NumPy arrays."""

    def step(carry, x):
        carry, y = jax.vmap(network.apply, in_axes=(None, 0, 0))(params, carry, x)
        return carry, (carry, y)

    return jax.tree.map(np.asarray, jax.jit(lambda: jax.lax.scan(step, carry, xs)[1])())


def inputs(seed: int) -> jax.Array:
    return 0.3 + jax.random.normal(jax.random.key(seed), (STEPS, BATCH, INPUTS), F64)


def read_back(made: nir.NIRGraph, tmp_path: Path) -> nir.NIRGraph:
    nir.write(tmp_path / "network.nir", made)
    return nir.read(tmp_path / "network.nir")


@pytest.fixture(scope="module")
def side_by_side():
    """Every kind of spiking unit on one input, and what it does in 40 steps."""
    network = graph({name: (cell, "input") for name, cell in SPIKING.items()}, outputs=tuple(SPIKING))
    xs = inputs(0)
    params, carry = network.init(jax.random.key(1), xs[0])
    return network, params, xs, *run(network, params, carry, xs)


@pytest.mark.parametrize("integration", ["euler", "exponential"])
def test_every_reset_makes_the_same_spikes(side_by_side, integration: str, tmp_path: Path) -> None:
    network, params, xs, carries, spikes = side_by_side
    made = read_back(to_nir(network, params, dt=2e-3, integration=integration), tmp_path)
    assert made.metadata["dt"] == 2e-3
    seen, potentials = simulate(made, np.asarray(xs), 2e-3, exact=integration == "exponential")
    for name in SPIKING:
        assert 0.05 < spikes[name].mean() < 0.8, name
        np.testing.assert_array_equal(seen[f"output_{name}"], spikes[name], err_msg=name)
        node = name if name.startswith("zero") else f"{name}_potential"
        np.testing.assert_allclose(potentials[node], carries[name][0], rtol=0, atol=TOLERANCE, err_msg=name)
    # An adaptation is fed by the spikes that it follows, and so stands there one step before it does here.
    np.testing.assert_allclose(
        potentials["adaptive_adaptation"][:-1], carries["adaptive"][1][1:], rtol=0, atol=TOLERANCE
    )


def test_the_words_that_nir_has(side_by_side) -> None:
    network, params, *_ = side_by_side
    made = to_nir(network, params)
    kinds = {name: type(node).__name__ for name, node in made.nodes.items()}
    assert kinds["zero_alone"] == "LIF" and ("zero_alone", "zero_alone_recurrent") not in made.edges
    assert (kinds["none_alone_potential"], kinds["none_alone"]) == ("LI", "Threshold")
    assert "none_alone_recurrent" not in kinds
    assert kinds["subtract_alone_recurrent"] == "Scale" and kinds["subtract_recurrent"] == "Linear"
    # τ of the cell, 8 steps, where a step is solved exactly.
    exact = to_nir(network, params, dt=1e-3, integration="exponential")
    np.testing.assert_allclose(exact.nodes["zero"].tau, 8e-3)


def test_another_step_than_that_of_the_export_makes_other_spikes(side_by_side) -> None:
    """So the comparison can fail."""
    network, params, xs, _, spikes = side_by_side
    seen, _ = simulate(to_nir(network, params), np.asarray(xs), 1.3e-3)
    assert any((seen[f"output_{name}"] != spikes[name]).any() for name in SPIKING)


def test_layers_graphs_and_readouts(tmp_path: Path) -> None:
    deep = stack(lif(UNITS, reset="zero", tau=8.0, threshold=0.5, param_dtype=F64), depth=2)
    network = graph(
        {
            "encoder": (nn.Dense(UNITS, param_dtype=F64), "input"),
            "deep": (deep, "encoder"),
            "inner": (stack(feedback_dense(UNITS, param_dtype=F64), low_pass(tau=4.0)), ("input", "deep")),
            "mean": (low_pass(tau=6.0), ("deep", "inner")),
            "high": (alif(3, tau=8.0, threshold=0.3, param_dtype=F64), ("deep", "input", "inner")),
            "readout": (leaky_readout(2, param_dtype=F64), ("high", "mean")),
            "lean": (leaky_readout(2, use_bias=False, low_pass=True, param_dtype=F64), "high"),
            "linear": (nnx.Linear(3, 2, param_dtype=F64, rngs=nnx.Rngs(0)), "high"),
            "no_bias": (nn.Dense(2, use_bias=False, param_dtype=F64), ("high", "readout")),
        },
        outputs=("high", "readout", "lean", "linear", "no_bias", "inner"),
    )
    xs = inputs(3)
    params, carry = network.init(jax.random.key(4), xs[0])
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases that are not 0
    _, ys = run(network, params, carry, xs)
    seen, _ = simulate(read_back(to_nir(deep_eprop(network), params), tmp_path), np.asarray(xs), 1e-3)
    assert 0.05 < ys["high"].mean() < 0.8
    np.testing.assert_array_equal(seen["output_high"], ys["high"])
    for name, y in ys.items():
        np.testing.assert_allclose(seen[f"output_{name}"], y, rtol=0, atol=TOLERANCE, err_msg=name)


def test_arrays_keep_the_dtype_of_the_parameters() -> None:
    for dtype, wanted in ((jnp.float32, np.float32), (jnp.bfloat16, np.float32), (F64, np.float64)):
        network = stack(lif(3, param_dtype=dtype), leaky_readout(2, param_dtype=dtype))
        params, _ = network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS), dtype))
        nodes = to_nir(network, params).nodes
        arrays = [a for n in nodes.values() for a in vars(n).values() if isinstance(a, np.ndarray)]
        assert {a.dtype for a in arrays} == {np.dtype(wanted)}


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lif(3, refractory=2.0), "Node '1'.*no refractory period; seen refractory=2.0.*refractory=0"),
        (alif(3, reset="zero"), "Node '1'.*alif with reset='zero'.*threshold that does not move.*subtract"),
        (lru(3, state_size=4), "Node '1'.*it is lru.*Known are nn.Dense"),
        (nn.GRUCell(features=3), "Node '1'.*it is GRUCell"),
        (nn.relu, "Node '1'.*it is relu"),
        (nnx.GRUCell(4, 3, rngs=nnx.Rngs(0)), "Node '1'.*it is GRUCell"),
    ],
)
def test_what_nir_has_no_word_for_is_refused_by_name(layer: object, words: str) -> None:
    network = stack(nn.Dense(4), layer)
    params, _ = network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS), jnp.float32))
    with pytest.raises(ValueError, match=words):
        to_nir(network, params)


def test_other_networks_that_are_refused() -> None:
    x = jnp.zeros((BATCH, INPUTS), jnp.float32)
    low = lif(3)
    by_dict = graph({"low": (low, "input"), "pair": (lambda x: x["a"], {"a": "low"})}, outputs="pair")
    params, _ = by_dict.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Node 'pair'.*dict.*as a tuple"):
        to_nir(by_dict, params)
    shown = stack(low, nn.Dense(2), outputs=("1", carry_of("0", 0)))
    params, _ = shown.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Node '0'.*carry_of.*params are the same"):
        to_nir(shown, params)
    with pytest.raises(ValueError, match=r"Node 'cell'.*length of the external input.*Dense"):
        to_nir(low_pass(), {})


def test_bad_arguments() -> None:
    network = stack(lif(3), nn.Dense(2))
    params, _ = network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS), jnp.float32))
    with pytest.raises(ValueError, match=r"dt is the length of a step, above 0.*seen 0"):
        to_nir(network, params, dt=0)
    with pytest.raises(ValueError, match="'euler', 'exponential'; seen 'midpoint'"):
        to_nir(network, params, integration="midpoint")
    with pytest.raises(ValueError, match="nothing at node '1'"):
        to_nir(network, params[:1])
    with pytest.raises(ValueError, match=r"params of node '0' are not those of its cell.*input_kernel"):
        to_nir(network, params[::-1])
    other, _ = stack(lif(4), nn.Dense(2)).init(jax.random.key(0), jnp.zeros((BATCH, INPUTS), jnp.float32))
    with pytest.raises(ValueError, match=r"node '1' are for 4 inputs, and \[3\] enter"):
        to_nir(network, (params[0], other[1]))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match="pip install nir"):
        to_nir(lif(3), {})
