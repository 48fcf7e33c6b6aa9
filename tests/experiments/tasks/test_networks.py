"""The networks of the experiments follow their equations, and the library sees in them what it should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, analyse, deep_eprop, linen_cell
from deepeprop_jax.reference import bptt
from experiments.program.refusal import Refused
from experiments.tasks import evidence, networks
from experiments.tasks.targets import cross_entropy
from experiments.tasks.xor_count import sample
from tests.gradients import FLOAT64, SAME, assert_same_gradient, relative_errors

pytestmark = pytest.mark.mixed_promotion  # Layers of float32 on inputs of float64.

FEATURES, BATCH, WIDTH = 3, 2, 5


def problem(network: Cell) -> tuple:
    """Parameters and carry in float64, and the inputs and targets of two sequences of 8 steps."""
    xs, targets = sample(jax.random.key(0), BATCH, cues=3, gap=2, delay=2, width=WIDTH, distractors=True)
    xs = xs.astype(jnp.float64)
    params, carry = network.init(jax.random.key(1), xs[0])
    # Away from zero biases, where tanh units are odd and some terms vanish.
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return (
        jax.tree.unflatten(structure, leaves),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float64), carry),
        xs,
        targets,
    )


def gradients(network: Cell, **options) -> tuple:
    """The gradient in segments of 3 steps, and that of BPTT."""
    params, carry, xs, targets = problem(network)
    learner = deep_eprop(network, **options)
    online = jax.jit(learner.value_and_grad(cross_entropy, segment_length=3))
    _, grads = online(params, learner.init(params, carry, xs[0]), xs, targets)
    _, reference = jax.jit(bptt(network, cross_entropy))(params, carry, xs, targets)
    return grads, reference


def recurrences(network: Cell) -> list[str]:
    params, carry, xs, _ = problem(network)
    return [node.recurrence for node in analyse(network, params, carry, xs[0]).nodes]


EXACT = {
    "ladder": networks.xor_network(FEATURES, 2, decay=0.8, depth=4),
    "rotated": networks.xor_network(FEATURES, 2, decay=0.8, angle=0.5),
    "leaky": networks.xor_network(FEATURES, 2, decay=0.8, memory=0.5),
    "motif": networks.motif_network(FEATURES, 2),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_exact_gradients_equal_bptt(name: str) -> None:
    grads, reference = gradients(EXACT[name], exact=True)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(reference))
    assert_same_gradient(grads, reference, FLOAT64, name)


def test_deep_eprop_is_exact_below_an_integrator_and_not_below_a_rotated_one() -> None:
    """The element-wise memory is why XOR-count is solved; the rotation is what takes it away."""
    assert_same_gradient(*gradients(networks.xor_network(FEATURES, 2, decay=0.8)), FLOAT64)
    grads, reference = gradients(EXACT["rotated"])
    errors = relative_errors(grads[0], reference[0])
    assert min(errors.values()) > 1e-3


def test_without_traces_across_layers_a_silent_delay_leaves_the_detectors_weights_no_gradient() -> None:
    """The loss comes when nothing is shown: the instantaneous signal finds zero inputs, and biases alone."""
    network = networks.xor_network(FEATURES, 2, decay=0.8)
    xs, targets = sample(jax.random.key(0), BATCH, cues=3, gap=2, delay=2, width=WIDTH)
    params, carry = network.init(jax.random.key(1), xs[0])
    found = {}
    for hops in (None, 0):
        learner = deep_eprop(network, hops=hops)
        run = jax.jit(learner.value_and_grad(cross_entropy, segment_length=3))
        found[hops] = run(params, learner.init(params, carry, xs[0]), xs, targets)[1]
    kernel, bias = (found[0][0]["params"]["Dense_0"][name] for name in ("kernel", "bias"))
    assert not kernel.any() and bias.any()
    assert found[None][0]["params"]["Dense_0"]["kernel"].any()


def test_what_the_analysis_says_of_each_layer() -> None:
    assert recurrences(networks.xor_network(FEATURES, 2, 0.8)) == ["feed-forward", "element-wise", "feed-forward"]
    assert recurrences(EXACT["leaky"]) == ["element-wise", "element-wise", "feed-forward"]
    assert recurrences(EXACT["ladder"]) == ["feed-forward", "localised", "localised", "element-wise", "feed-forward"]
    _, rotated, _ = recurrences(EXACT["rotated"])
    assert rotated in ("localised", "dense")


def test_a_leaky_detector_without_memory_is_the_detector() -> None:
    leaky, detector = networks.leaky_detector(FEATURES, 0.0), linen_cell(networks.Detector(FEATURES))
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    params, h = leaky.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, detector.init(jax.random.key(1), x)[0])
    before = h[0] + 7
    np.testing.assert_array_equal(leaky.apply(params, before, x[0])[1], detector.apply(params, (), x[0])[1])


def test_detectors_start_with_the_biases_asked_for() -> None:
    """Zero, or five standard errors of a standard deviation; the weights do not depend on it."""
    x = jnp.zeros((1, WIDTH), jnp.float32)
    cells = (linen_cell(networks.Detector(1000, 0.5)), networks.leaky_detector(1000, 0.9, 0.5))
    zero = linen_cell(networks.Detector(1000)).init(jax.random.key(0), x)[0]["params"]["Dense_0"]
    assert not zero["bias"].any()
    for cell in cells:
        dense = cell.init(jax.random.key(0), x)[0]["params"]["Dense_0"]
        np.testing.assert_allclose(dense["bias"].std() / 0.5, 1, atol=5 / np.sqrt(2000))
        np.testing.assert_array_equal(dense["kernel"], zero["kernel"])


def test_a_detector_from_rest_is_silent_in_silence() -> None:
    """tanh(W x + b) − tanh(b), with the parameters of the other detector; and so is one that remembers."""
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTH)).at[0].set(0)
    plain, rested = (linen_cell(networks.Detector(FEATURES, 0.5, from_rest)) for from_rest in (False, True))
    params = plain.init(jax.random.key(1), x)[0]
    jax.tree.map(np.testing.assert_array_equal, params, rested.init(jax.random.key(1), x)[0])
    (_, y), (_, found) = (jax.vmap(cell.apply, (None, None, 0))(params, (), x) for cell in (plain, rested))
    np.testing.assert_allclose(found, y - y[0], atol=1e-6)
    leaky = networks.leaky_detector(FEATURES, 0.5, 0.5, from_rest=True)
    _, h = jax.vmap(leaky.apply, (None, 0, 0))(params, jnp.zeros((BATCH, FEATURES)), x)
    np.testing.assert_allclose(h, found / 2, atol=1e-6)


def test_a_leaky_detector_follows_its_equation() -> None:
    cell = networks.leaky_detector(FEATURES, 0.9)
    params, h, xs, _ = problem(cell)
    weight, bias = (np.asarray(params["params"]["Dense_0"][name]) for name in ("kernel", "bias"))
    expected = np.asarray(h[0])
    assert not expected.any()
    state = h[0]
    for x in np.asarray(xs[:, 0]):
        state, y = cell.apply(params, state, x)
        expected = 0.9 * expected + 0.1 * np.tanh(x @ weight + bias)
        np.testing.assert_allclose(y, expected, rtol=SAME)
        np.testing.assert_array_equal(y, state)


def test_a_relay_follows_its_equation() -> None:
    cell = networks.relay(FEATURES)
    params, h, xs, _ = problem(cell)
    weight, recurrent, bias = (np.asarray(params[name]) for name in "WRb")
    state, expected = h[0], np.zeros(FEATURES)
    for x in np.asarray(xs[:, 0]):
        state, y = cell.apply(params, state, x)
        expected = 0.4 * expected + 0.6 * np.tanh(x @ weight + expected @ recurrent + bias)
        np.testing.assert_allclose(y, expected, rtol=SAME)
        np.testing.assert_array_equal(y, state)


def test_relays_start_with_the_gains_asked_for() -> None:
    """Five standard errors of a standard deviation, 1/√(2 entries) of it."""
    params, _ = networks.relay(64).init(jax.random.key(0), jnp.zeros((1, 100), jnp.float32))
    for name, gain, inputs in (("W", 1.5, 100), ("R", 0.9, 64)):
        assert params[name].dtype == jnp.float32
        np.testing.assert_allclose(params[name].std() * np.sqrt(inputs) / gain, 1, atol=5 / np.sqrt(2 * inputs * 64))
    assert not params["b"].any()


@pytest.mark.parametrize(("angle", "diagonal"), [(0.02, 1.0), (0.1, 0.995), (0.5, 0.887)])
def test_a_rotation_is_orthogonal_and_mixes_as_much_as_stated(angle: float, diagonal: float) -> None:
    matrix = networks.rotation(16, angle)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-12)
    assert np.linalg.det(matrix) > 0
    assert round(float(np.mean(np.diag(matrix))), 3) == diagonal


def test_a_rotated_integrator_rotates_the_state_and_nothing_else() -> None:
    plain = networks.integrator(FEATURES, 0.8)
    rotated = networks.rotated_integrator(FEATURES, 0.8, 0.5)
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    weight, carry = plain.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, (weight, carry), rotated.init(jax.random.key(1), x))
    h = jax.random.normal(jax.random.key(2), (FEATURES,))
    expected = 0.8 * np.asarray(h) @ networks.rotation(FEATURES, 0.5) + 0.2 * 3 * np.asarray(x[0] @ weight)
    np.testing.assert_allclose(rotated.apply(weight, h, x[0])[1], expected, rtol=SAME)


def test_relays_stand_between_detector_and_integrator() -> None:
    x = jnp.zeros((BATCH, WIDTH))
    for depth in (2, 3, 5):
        params, _ = networks.xor_network(FEATURES, 2, 0.9, depth=depth).init(jax.random.key(0), x)
        relays = [isinstance(layer, dict) and "R" in layer for layer in params]
        assert relays == [False, *[True] * (depth - 2), False, False]


@pytest.mark.parametrize(("cells", "layers"), [("ALIF", 2), ("LIF, ALIF", 3), ("ALIF, tanh", 3)])
def test_spiking_layers_below_a_readout(cells: str, layers: int) -> None:
    network = networks.spiking_network(5, 2, cells, dt=10.0)
    xs, _ = evidence.sample(jax.random.key(0), 3)
    params, carry = jax.eval_shape(network.init, jax.random.key(1), xs[0])
    assert len(params) == layers
    _, y = jax.eval_shape(jax.vmap(network.apply, (None, 0, 0)), params, carry, xs[0])
    assert y.shape == (3, 2)
    with pytest.raises(Refused, match="Did you mean 'LIF, ALIF'"):
        networks.spiking_network(5, 2, "LIF, ALF", dt=10.0)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be >= 2; seen 1"):
        networks.xor_network(FEATURES, 2, 0.9, depth=1)
    with pytest.raises(ValueError, match=r"memory must be in \[0, 1\); seen 1"):
        networks.leaky_detector(FEATURES, 1.0)
    with pytest.raises(ValueError, match=r"leak must be in \(0, 1\]; seen 0"):
        networks.relay(FEATURES, leak=0.0)
