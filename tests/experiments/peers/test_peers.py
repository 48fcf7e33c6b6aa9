"""Other libraries beside this one: what is asked of them where they are, what is stored, what the page says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.cells import rtu
from experiments.peers import with_braintrace, with_memorax
from experiments.peers.network import Sizes, Theirs, linear
from experiments.program.refusal import Refused
from experiments.studies import peers


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(with_braintrace.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        peers.main(["--libraries", "braintrace"])
    assert stopped.value.code == 2
    assert "braintrace is not installed" in capsys.readouterr().err
    assert with_memorax.missing() == "memorax is not installed"


@pytest.mark.mixed_promotion
def test_another_network_is_refused() -> None:
    """The rows stand side by side only where both are the same network; a zero that is none is named."""
    sizes = Sizes(units=3, steps=4, batch=2, outputs=1)
    key = jax.random.key(0)
    params = (
        {"W": {"weight": jax.random.normal(key, (6, 3))}},
        {"readout": {"weight": jax.random.normal(key, (3, 1))}},
    )
    cells = [with_braintrace.same("tanh", 3, params[0])]
    cells.append(with_braintrace.Cell(with_braintrace._given(params[1], ()), with_braintrace._readout))

    def bptt(leak: float, xs: jax.Array, targets: jax.Array) -> tuple:
        def loss(params: tuple) -> jax.Array:
            h, total = jnp.zeros((sizes.batch, sizes.units)), jnp.zeros(())
            for x, target in zip(xs, targets, strict=True):
                h = leak * h + jnp.tanh(linear(params[0]["W"], jnp.concatenate([x, h], axis=1)))
                total += jnp.mean((linear(params[1]["readout"], h) - target) ** 2)
            return total

        return jax.grad(loss)(params)

    rules = {"none": lambda xs, targets: jax.tree.map(jnp.zeros_like, params)}
    found = peers.measure(Theirs(params, lambda *data: bptt(0.0, *data), rules, tuple(cells)), sizes, seed=0)
    assert found["none"][0]["zero"] == ["W"] and found["none"][0]["relative_error"] == pytest.approx(1)
    assert found["here: exact=True"][0]["relative_error"] < 1e-9 < found["here: deep e-prop"][0]["relative_error"]
    with pytest.raises(Refused, match="another gradient"):
        peers.measure(Theirs(params, lambda *data: bptt(0.1, *data), rules, tuple(cells)), sizes, seed=0)


def test_gradients_of_pieces_are_summed() -> None:
    """With what is carried made constant for the next one, as truncated BPTT has it."""
    xs = jnp.arange(6.0)

    def loss(theta: jax.Array, carry: jax.Array, xs: jax.Array, targets: jax.Array) -> tuple:
        carry = carry + theta * xs.sum()
        return carry + targets.sum(), carry

    total, grads, end = with_memorax.by_pieces(loss, jnp.asarray(2.0), jnp.zeros(()), xs, xs, 2)
    assert float(end) == 2 * 15 and float(grads) == 15
    assert float(total) == 2 * (1 + 6 + 15) + 15


@pytest.mark.mixed_promotion
def test_parameters_are_renamed_and_turned() -> None:
    params, _ = rtu(3).init(jax.random.key(0), jnp.zeros((2, 5)))
    leaves = with_memorax.renamed("RTU", params)["params"]["sequence_model"]["cell"]
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "nu_log": (3,),
        "theta_log": (3,),
        "B_real": (3, 5),
        "B_imag": (3, 5),
    }
    np.testing.assert_array_equal(leaves["B_imag"], params["input_kernel_2"].T)


@pytest.mark.slow
@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_their_networks_are_ours(library: str) -> None:
    """Where they are installed; ``measure`` refuses another gradient of BPTT."""
    module = peers.LIBRARIES[library]
    if (reason := module.missing()) is not None:
        pytest.skip(reason)
    sizes = Sizes(units=4, steps=5, batch=3, outputs=2)
    with jax.enable_x64(False):
        for cell in module.CELLS:
            found = peers.measure(module.network(cell, sizes, 0), sizes, 0)
            assert max(layer["relative_error"] for layer in found["here: exact=True"]) < 1e-5
