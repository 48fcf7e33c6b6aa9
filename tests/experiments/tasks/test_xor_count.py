"""XOR-count is what its docstring says: balanced, invisible to linear readouts, and its delay tells nothing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import xor_count
from tests.experiments.tasks.chance import five_standard_errors, linear_accuracy

COUNT, CUES, GAP, DELAY, WIDTH = 4000, 5, 3, 10, 8
CUE_STEPS = np.arange(0, CUES * GAP, GAP)
sample = partial(xor_count.sample, cues=CUES, gap=GAP, delay=DELAY, width=WIDTH)


@pytest.fixture(scope="module", params=[False, True], ids=["silent", "distractors"])
def distractors(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def sequences(distractors: bool) -> tuple[np.ndarray, np.ndarray]:
    """4,000 examples: xs (T, batch, width) and their labels."""
    xs, targets = sample(jax.random.key(0), COUNT, distractors=distractors)
    return np.asarray(xs), np.asarray(targets.label[-1])


def by_example(xs: np.ndarray) -> np.ndarray:
    return xs.swapaxes(0, 1)


def test_shapes_and_dtypes(distractors: bool) -> None:
    xs, targets = sample(jax.random.key(0), 7, distractors=distractors)
    assert (xs.shape, xs.dtype) == ((CUES * GAP + DELAY, 7, WIDTH), jnp.float32)
    assert (targets.label.shape, targets.label.dtype) == ((25, 7), jnp.int32)
    assert (targets.weight.shape, targets.weight.dtype) == ((25, 7), jnp.float32)
    np.testing.assert_array_equal(targets.weight, np.arange(25)[:, None].repeat(7, axis=1) == 24)


def test_labels_follow_their_definition(sequences: tuple[np.ndarray, np.ndarray]) -> None:
    xs, labels = sequences
    for example in range(50):
        votes = sum(xs[cue * GAP, example, 0] * xs[cue * GAP, example, 1] for cue in range(CUES))
        assert labels[example] == (votes > 0)


@pytest.mark.mixed_promotion
def test_a_running_label_is_that_of_the_votes_so_far() -> None:
    xs, targets = sample(jax.random.key(0), 50, running=True)
    np.testing.assert_array_equal(xs, sample(jax.random.key(0), 50)[0])
    votes, cues, asked = np.zeros(50), 0, []
    for step, x in enumerate(np.asarray(xs)):
        if step in CUE_STEPS:
            votes, cues = votes + x[:, 0] * x[:, 1], cues + 1
        elif cues % 2:
            asked.append(step)
            np.testing.assert_array_equal(targets.label[step], votes > 0)
    assert len(asked) == 3 * (GAP - 1) + DELAY
    weight = np.isin(np.arange(len(xs)), asked)[:, None].repeat(50, axis=1) / len(asked)
    np.testing.assert_allclose(targets.weight, weight, rtol=1e-6)


def test_cues_are_signs_and_the_steps_between_are_silent(sequences: tuple[np.ndarray, np.ndarray]) -> None:
    xs, _ = sequences
    assert set(np.unique(xs[CUE_STEPS])) == {-1.0, 1.0}
    assert not np.delete(xs[: CUES * GAP], CUE_STEPS, axis=0).any()


def test_a_silent_delay_is_all_zeros() -> None:
    xs, _ = sample(jax.random.key(0), COUNT)
    assert not xs[CUES * GAP :].any()


def test_a_distractor_is_a_cue_without_a_vote() -> None:
    xs = np.asarray(sample(jax.random.key(0), COUNT, distractors=True)[0])[CUES * GAP :]
    np.testing.assert_array_equal(np.sort(np.abs(xs[..., :2]), axis=-1), np.broadcast_to([0, 1], (DELAY, COUNT, 2)))
    np.testing.assert_array_equal(np.abs(xs[..., 2:]), 1)
    bound = five_standard_errors(0.5, COUNT)
    assert np.abs(np.mean(xs[..., 0] == 0, axis=1) - 0.5).max() < bound
    # Drawn anew at each step: two steps agree in what they zero half of the time.
    assert abs(np.mean((xs[0, :, 0] == 0) == (xs[1, :, 0] == 0)) - 0.5) < bound
    # x_0 is a fair sign in the half of the examples where it is not zeroed, so the variance of its half is 1/8.
    assert np.abs(xs.mean(axis=1) / 2).max() < bound


def test_distractors_leave_cues_and_labels_as_they_are() -> None:
    silent, distracted = (sample(jax.random.key(3), 50, distractors=distractors) for distractors in (False, True))
    np.testing.assert_array_equal(silent[0][: CUES * GAP], distracted[0][: CUES * GAP])
    np.testing.assert_array_equal(silent[1].label, distracted[1].label)


def test_labels_and_cues_are_balanced(sequences: tuple[np.ndarray, np.ndarray]) -> None:
    xs, labels = sequences
    bound = five_standard_errors(xor_count.CHANCE, COUNT)
    assert abs(labels.mean() - xor_count.CHANCE) < bound
    assert np.abs((xs[CUE_STEPS].mean(axis=1)) / 2).max() < bound


def test_the_label_is_invisible_to_a_linear_readout_of_everything_seen(
    sequences: tuple[np.ndarray, np.ndarray],
) -> None:
    xs, labels = sequences
    accuracy = linear_accuracy(by_example(xs), labels)
    assert abs(accuracy - xor_count.CHANCE) < five_standard_errors(xor_count.CHANCE, COUNT // 2)


def test_the_delay_tells_nothing_of_the_label(sequences: tuple[np.ndarray, np.ndarray]) -> None:
    """Neither its inputs nor the products of any two of them."""
    xs, labels = sequences
    delay = by_example(xs[CUES * GAP :])
    upper = np.triu_indices(WIDTH, 1)
    products = (delay[..., :, None] * delay[..., None, :])[..., upper[0], upper[1]]
    bound = five_standard_errors(xor_count.CHANCE, COUNT // 2)
    assert abs(linear_accuracy(delay, labels) - xor_count.CHANCE) < bound
    assert abs(linear_accuracy(products, labels) - xor_count.CHANCE) < bound


def test_the_sum_of_products_over_all_steps_tells_the_label(sequences: tuple[np.ndarray, np.ndarray]) -> None:
    """What a perfect solver counts: every example is right, so distractors have no vote."""
    xs, labels = sequences
    products = (xs[..., 0] * xs[..., 1]).sum(axis=0)
    np.testing.assert_array_equal(products > 0, labels)
    assert linear_accuracy(products, labels) == 1.0


def test_a_long_delay_is_as_long_as_asked() -> None:
    xs, targets = xor_count.sample(jax.random.key(0), 2, delay=300, distractors=True)
    assert xs.shape == (315, 2, 8) and targets.weight.shape == (315, 2)


def test_the_key_decides_and_jit_changes_nothing(distractors: bool) -> None:
    draw = partial(sample, batch=9, distractors=distractors)
    first, other = draw(jax.random.key(1)), draw(jax.random.key(2))
    for again in (draw(jax.random.key(1)), jax.jit(draw)(jax.random.key(1))):
        jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[0][CUE_STEPS] != other[0][CUE_STEPS]).any()
    if distractors:
        assert (first[0][-1] != other[0][-1]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cues": 4}, "odd number of cues.*cues=4"),
        ({"gap": 1, "delay": 0, "running": True}, "gap above 1, or a delay; seen gap=1, delay=0"),
        ({"width": 1}, "width >= 2; seen .*width=1"),
        ({"cues": 0}, "cues must be an integer >= 1; seen 0"),
        ({"gap": 0}, "gap must be an integer >= 1; seen 0"),
        ({"delay": -1}, "delay must be an integer >= 0; seen -1"),
        ({"delay": 2.5}, "delay must be an integer >= 0; seen 2.5"),
        ({"batch": 0}, "batch must be an integer >= 1; seen 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xor_count.sample(jax.random.key(0), **{"batch": 4, **arguments})
