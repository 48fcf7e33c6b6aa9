"""Other libraries beside this one: what is asked of them where they are, what is stored, what the page says."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.cells import rtu
from experiments.benchmarks.measure import HOISTED
from experiments.benchmarks.report import rows
from experiments.peers import with_braintrace, with_memorax
from experiments.peers.network import Sizes, Theirs, linear
from experiments.program import pages
from experiments.program.refusal import Refused
from experiments.studies import peers

ELEMENT_WISE = ("RTU", "LRU")
GRU, LSTM = (("GRU", "braintrace"), ("LSTM", "braintrace"))


def stored() -> dict:
    return json.loads((pages.DOCS / peers.STORED).read_text())


def test_the_page_shows_the_stored_figures() -> None:
    found = stored()
    page = (pages.DOCS / "peers.md").read_text()
    assert len(page.splitlines()) <= 80 and peers.COMMAND in page
    for library in peers.LIBRARIES:
        assert peers.table(found["rows"], library) in page
        assert f"{library} {found['versions'][library]}" in page
    twice = {
        row["rule"]: row["layers"][1]["norm_ratio"] for row in found["rows"] if (row["cell"], row["library"]) == LSTM
    }
    assert f"{twice['D_RTRL']:.1f} and {twice['SnAp(2)']:.1f} times too long" in page
    zero = {row["rule"]: row["layers"][0]["zero"] for row in found["rows"] if (row["cell"], row["library"]) == GRU}
    assert zero["D_RTRL"] == zero["SnAp(2)"] == ["Wr"] and not zero["here: hops=0"]


def test_the_page_shows_the_measured_times() -> None:
    """As the suite's own table has them."""
    measured = json.loads((pages.DOCS / "benchmarks" / "peers.json").read_text())
    page = (pages.DOCS / "peers.md").read_text()
    for record in measured["comparisons"]:
        for name, cpu, _, ratio, _, error, compiling, temporary, state, _ in rows(record, measured["machine"]):
            if name == HOISTED:
                continue
            cell = record["problem"]["cell"]
            assert f"| {cell} | {name} | {error} | {temporary} | {state} | {compiling} | {cpu} | {ratio} |" in page


def test_every_rule_and_mode_is_stored() -> None:
    found = stored()
    seen = {(row["library"], row["cell"]) for row in found["rows"]}
    assert seen == {(library, cell) for library, module in peers.LIBRARIES.items() for cell in module.CELLS}
    for row in found["rows"]:
        errors = [layer["relative_error"] for layer in row["layers"]]
        if row["rule"] == "here: exact=True":
            assert max(errors) < 1e-5
        if row["rule"] == "here: deep e-prop" and row["cell"] in ELEMENT_WISE:
            assert max(errors) < 1e-5
        if not row["rule"].startswith("here: "):
            assert errors[0] > 0.1  # None of them carries credit through time and depth at once.
        else:
            assert not any(layer["zero"] for layer in row["layers"])


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
@pytest.mark.mixed_promotion
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
