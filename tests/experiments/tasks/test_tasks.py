"""The data of the experiments are what their docstrings say; XOR-count has a file of its own."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import digits, evidence, motifs, pictures, recall
from experiments.tasks.targets import Targets, at_last_step, bit_cross_entropy, cross_entropy
from tests.experiments.tasks.chance import five_standard_errors, linear_accuracy

BLANK = 8
COUNT = 4000


@pytest.fixture(scope="module")
def images() -> tuple[digits.Images, digits.Images]:
    return digits.load()


@pytest.fixture(scope="module")
def motif_sequences() -> tuple[np.ndarray, np.ndarray]:
    """4,000 examples of five motifs and a delay of 12: xs (batch, T, 3) and their labels."""
    xs, targets = motifs.sample(jax.random.key(0), COUNT)
    return np.asarray(xs).swapaxes(0, 1), np.asarray(targets.label[-1])


def test_targets_ask_at_the_last_step_only() -> None:
    targets = at_last_step(jnp.array([3, 1]), 4)
    np.testing.assert_array_equal(targets.label, [[3, 1]] * 4)
    np.testing.assert_array_equal(targets.weight, [[0, 0]] * 3 + [[1, 1]])


def test_cross_entropy_is_weighted_and_averaged_over_the_batch() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    loss = cross_entropy(logits, Targets(jnp.array([0, 0]), jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(loss, np.log(4) / 2, rtol=1e-6)


def test_bit_cross_entropy_is_a_mean_over_bits_weighted_and_averaged_over_the_batch() -> None:
    logits = jnp.log(jnp.array([[1.0, 1.0], [1.0, 3.0]]))  # probabilities of a one: 1/2, 1/2; 1/2, 3/4
    loss = bit_cross_entropy(logits, Targets(jnp.array([[0, 1], [1, 0]]), jnp.array([0.0, 3.0])))
    np.testing.assert_allclose(loss, 3 * (np.log(2) + np.log(4)) / 2 / 2, rtol=1e-6)


def test_digits_are_the_same_fixed_split_of_all_images(images: tuple[digits.Images, digits.Images]) -> None:
    train, test = images
    assert (train.pixels.shape, test.pixels.shape) == ((1297, 8, 8), (500, 8, 8))
    assert float(train.pixels.min()) == 0 and float(train.pixels.max()) == 1
    again = digits.load()[1]
    np.testing.assert_array_equal(test.pixels, again.pixels)
    counts = np.bincount(np.concatenate([train.label, test.label]))
    assert counts.shape == (10,) and counts.min() == 174 and counts.max() == 183
    # The test set alone is balanced well enough that guessing one class stays near chance.
    assert np.bincount(test.label).max() / 500 < digits.CHANCE + 0.03


def test_without_scikit_learn_the_digits_say_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install -e"):
        digits.load()


def test_digits_show_their_rows_from_the_top_and_then_nothing(images: tuple[digits.Images, digits.Images]) -> None:
    xs, targets = digits.sequences(images[1], BLANK)
    assert xs.shape == (8 + BLANK, 500, 8)
    np.testing.assert_array_equal(xs[:8].transpose(1, 0, 2), images[1].pixels)
    assert not xs[8:].any()
    np.testing.assert_array_equal(targets.label[-1], images[1].label)


def test_digits_need_more_than_one_row(images: tuple[digits.Images, digits.Images]) -> None:
    """No single row tells the class; all rows together do."""
    pixels, labels = np.asarray(images[0].pixels), np.asarray(images[0].label)
    assert max(linear_accuracy(pixels[:, row], labels) for row in range(8)) < 0.65
    assert linear_accuracy(pixels.reshape(-1, 64), labels) > 0.9


def test_digits_show_one_pixel_a_step_in_reading_order(images: tuple[digits.Images, digits.Images]) -> None:
    xs, targets = digits.sequences(images[1], BLANK, pixels_per_step=1)
    assert (xs.shape, xs.dtype) == ((64 + BLANK, 500, 1), jnp.float32)
    for row, column in ((0, 3), (2, 5), (7, 4)):
        np.testing.assert_array_equal(xs[8 * row + column, :, 0], images[1].pixels[:, row, column])
    assert xs[:64].any(axis=(1, 2)).sum() > 50 and not xs[64:].any()
    np.testing.assert_array_equal(targets.label[-1], images[1].label)
    np.testing.assert_array_equal(targets.weight.sum(axis=0), 1)


@pytest.mark.parametrize("pixels_per_step", [8, 1])
def test_digits_are_sampled_by_key_alone(images: tuple[digits.Images, digits.Images], pixels_per_step: int) -> None:
    sample = partial(digits.sample, images=images[0], batch=4, blank=BLANK, pixels_per_step=pixels_per_step)
    first, other = sample(jax.random.key(1)), sample(jax.random.key(2))
    for again in (sample(jax.random.key(1)), jax.jit(sample)(jax.random.key(1))):
        jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[0] != other[0]).any()


def test_digits_refuse_impossible_arguments(images: tuple[digits.Images, digits.Images]) -> None:
    with pytest.raises(ValueError, match="divide the 64 pixels of an image; seen 7"):
        digits.sequences(images[1], 0, pixels_per_step=7)
    with pytest.raises(ValueError, match="blank must be an integer >= 0; seen -1"):
        digits.sequences(images[1], -1)
    with pytest.raises(ValueError, match="batch must be an integer >= 1; seen 0"):
        digits.sample(jax.random.key(0), images[1], 0, 0)


def test_motifs_have_the_shapes_and_dtypes_stated() -> None:
    xs, targets = motifs.sample(jax.random.key(0), 7, presentations=3, delay=6)
    assert (xs.shape, xs.dtype) == ((15, 7, 3), jnp.float32)
    assert (targets.label.shape, targets.label.dtype) == ((15, 7), jnp.int32)
    assert (targets.weight.shape, targets.weight.dtype) == ((15, 7), jnp.float32)
    np.testing.assert_array_equal(targets.weight, np.arange(15)[:, None].repeat(7, axis=1) == 14)


def test_a_perfect_solver_of_motifs_is_always_right(motif_sequences: tuple[np.ndarray, np.ndarray]) -> None:
    """Nearest motif, then count, written out."""
    xs, labels = motif_sequences
    shown = xs[:, :15].reshape(COUNT, 5, 3, 3)
    templates = np.eye(3)[[[0, 1, 2], [1, 2, 0], [2, 1, 0]]]
    nearest = np.argmin(((shown[:, :, None] - templates) ** 2).sum(axis=(-2, -1)), axis=-1)
    counts = np.stack([(nearest == motif).sum(axis=1) for motif in range(3)], axis=1)
    np.testing.assert_array_equal(counts.argmax(axis=1), labels)
    assert (np.sort(counts, axis=1)[:, 2] > np.sort(counts, axis=1)[:, 1]).all()


def test_motifs_are_balanced(motif_sequences: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = motif_sequences
    for presentations in (1, 2, 5):
        counts = np.bincount(motifs.untied(presentations)[1])
        assert (counts == counts[0]).all() and len(counts) == 3
    bound = five_standard_errors(motifs.CHANCE, COUNT)
    assert np.abs(np.bincount(labels) / COUNT - motifs.CHANCE).max() < bound


def test_motifs_are_invisible_to_sums_over_steps_and_to_the_delay(
    motif_sequences: tuple[np.ndarray, np.ndarray],
) -> None:
    xs, labels = motif_sequences
    bound = five_standard_errors(motifs.CHANCE, COUNT // 2)
    random_features = np.tanh(xs @ np.random.default_rng(0).normal(size=(3, 20)) + 0.5)
    assert abs(linear_accuracy(xs.sum(axis=1), labels) - motifs.CHANCE) < bound
    assert abs(linear_accuracy(random_features.sum(axis=1), labels) - motifs.CHANCE) < bound
    assert abs(linear_accuracy(xs[:, 15:], labels) - motifs.CHANCE) < bound
    assert np.abs(xs[:, 15:].mean(axis=(0, 1))).max() < 5 * 0.1 / np.sqrt(COUNT * 12)
    # As said: with the time of each step known, a linear readout sees the label.
    assert linear_accuracy(xs[:, :15], labels) > 0.95


def test_motifs_are_sampled_by_key_alone() -> None:
    sample = partial(motifs.sample, batch=9)
    first, other = sample(jax.random.key(1)), sample(jax.random.key(2))
    again, compiled = sample(jax.random.key(1)), jax.jit(sample)(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    # Compiled, the noise may be added in one rounding instead of two.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), first, compiled)
    assert (np.abs(first[0] - other[0]) > 0.5).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"presentations": 0}, "presentations must be an integer >= 1; seen 0"),
        ({"presentations": 10}, "at most 9 presentations .*presentations=10"),
        ({"noise": -0.1}, "noise >= 0; seen .*noise=-0.1"),
        ({"delay": -1}, "delay must be an integer >= 0; seen -1"),
    ],
)
def test_motifs_refuse_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        motifs.sample(jax.random.key(0), 4, **arguments)


def test_recall_shows_a_pattern_a_pause_and_a_signal_and_asks_for_the_pattern() -> None:
    xs, targets = recall.sample(jax.random.key(0), 100)
    assert (xs.shape, xs.dtype) == ((48, 100, 8), jnp.float32)
    assert (targets.label.shape, targets.label.dtype) == ((48, 100, 7), jnp.int32)
    assert (targets.weight.shape, targets.weight.dtype) == ((48, 100), jnp.float32)
    assert set(np.unique(xs[:20, :, :7])) == {-1.0, 1.0}
    assert not xs[20:, :, :7].any()
    np.testing.assert_array_equal(xs[:, :, 7], np.arange(48)[:, None].repeat(100, axis=1) == 27)
    np.testing.assert_array_equal(targets.label[28:] * 2 - 1, xs[:20, :, :7])
    np.testing.assert_allclose(targets.weight, (np.arange(48)[:, None].repeat(100, axis=1) >= 28) / 20)


def test_recall_bits_are_fair_and_independent() -> None:
    """Every bit, and every pair of bits in a row and of one bit in two rows that follow each other."""
    xs, _ = recall.sample(jax.random.key(0), COUNT)
    pattern = np.asarray(xs[:20, :, :7])
    bound = 2 * five_standard_errors(recall.CHANCE, COUNT)
    assert np.abs(pattern.mean(axis=1)).max() < bound
    within = np.einsum("tbi,tbj->tij", pattern, pattern) / COUNT - np.eye(7)
    assert np.abs(within).max() < bound
    assert np.abs((pattern[1:] * pattern[:-1]).mean(axis=1)).max() < bound


@pytest.mark.mixed_promotion
def test_guessing_and_knowing_in_recall_cost_what_is_stated() -> None:
    xs, targets = recall.sample(jax.random.key(0), 50)

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(bit_cross_entropy)(logits, targets))

    np.testing.assert_allclose(loss(jnp.zeros((48, 50, 7))), np.log(2), rtol=1e-5)
    known = jnp.zeros((48, 50, 7)).at[28:].set(100 * xs[:20, :, :7])
    assert loss(known) < 1e-6


def test_recall_is_sampled_by_key_alone() -> None:
    sample = partial(recall.sample, batch=3, bits=2, length=4, pad=0)
    first, other = sample(jax.random.key(1)), sample(jax.random.key(2))
    assert first[0].shape == (9, 3, 3)
    for again in (sample(jax.random.key(1)), jax.jit(sample)(jax.random.key(1))):
        jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize(
    ("name", "value", "least"), [("bits", 0, 1), ("length", 0, 1), ("pad", -1, 0), ("batch", 0, 1)]
)
def test_recall_refuses_impossible_arguments(name: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= {least}; seen {value}"):
        recall.sample(jax.random.key(0), **{"batch": 4, name: value})


def test_evidence_is_on_the_side_of_more_cues() -> None:
    xs, targets = evidence.sample(jax.random.key(0), 2000)
    xs, label = np.asarray(xs), np.asarray(targets.label[-1])
    assert xs.shape == (225, 2000, 40) and set(np.unique(xs)) == {0, 1}
    left, right, asking, noise = np.split(xs, 4, axis=-1)
    # A cue is on one side, for 10 steps of 15.
    sides = np.stack([part[:105].sum(-1).reshape(7, 15, -1) for part in (left, right)])
    assert (sides[:, :, 10:] == 0).all() and (left[105:].sum(), right[105:].sum()) == (0, 0)
    shown = sides.sum(2)
    assert (shown.min(0) == 0).all() and (shown.max(0) > 0).all()
    assert (((shown[1] > 0).sum(0) > 3) == label).all()
    for spikes, rate in ((asking[-15:], 0.4), (noise, 0.1), (left[:10, shown[0, 0] > 0], 0.4)):
        assert abs(spikes.mean() - rate) < five_standard_errors(rate, spikes.size)
    assert asking[:-15].sum() == 0
    assert abs(label.mean() - 0.5) < five_standard_errors(0.5, 2000)
    # Likelier sides: of two cues of a trial, 0.7² + 0.3² are on the same one.
    same = ((shown[0, 0] > 0) == (shown[0, 1] > 0)).mean()
    assert abs(same - 0.58) < five_standard_errors(0.58, 2000)
    np.testing.assert_allclose(targets.weight.sum(0), 1, rtol=1e-6)
    assert (targets.weight[:-15] == 0).all()


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("cues", 6), ("delay", -1), ("recall", 0)])
def test_evidence_refuses(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        evidence.sample(jax.random.key(0), **{"batch": 4, name: value})


def test_every_task_has_its_picture(tmp_path: Path) -> None:
    drawn = {path.stem for path in (Path(__file__).parents[3] / "docs" / "tasks").glob("*.png")}
    assert drawn == set(pictures.PICTURES)
    for task in ("xor_count_distractors", "recall"):
        title, example = pictures.PICTURES[task]
        pictures.draw(title, *example(), tmp_path / "new" / f"{task}.png")
        assert (tmp_path / "new" / f"{task}.png").read_bytes().startswith(b"\x89PNG")
