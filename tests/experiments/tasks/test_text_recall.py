"""Recall in a text is what its head says: pairs, real text, a question that only the pair asked for answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.program.refusal import Refused
from experiments.tasks import text_recall
from experiments.training import settings
from tests.experiments.tasks.chance import five_standard_errors

SIZE, PAIRS, GAP, COUNT = 20, 3, 12, 4000
TEXT = jnp.asarray(np.arange(500) * 7 % SIZE, jnp.int32)


@pytest.fixture(scope="module")
def sequences():
    """The numbers shown (T, batch), and the labels."""
    xs, targets = text_recall.sample(jax.random.key(0), TEXT, SIZE, COUNT, pairs=PAIRS, gap=GAP)
    assert (xs.shape, xs.dtype) == ((3 * PAIRS + GAP + 2, COUNT, SIZE + 1), jnp.float32)
    np.testing.assert_array_equal(xs.sum(-1), 1)
    last = np.arange(len(xs))[:, None].repeat(COUNT, axis=1) == len(xs) - 1
    np.testing.assert_array_equal(targets.weight, last)
    assert targets.label.dtype == jnp.int32
    return np.asarray(xs).argmax(-1), np.asarray(targets.label[-1])


def test_the_answer_is_the_value_of_the_key_that_is_asked_for(sequences):
    shown, labels = sequences
    marks = np.flatnonzero((shown == SIZE).all(axis=1))
    assert marks.tolist() == [0, 3, 6, 3 * PAIRS + GAP] and (shown == SIZE).sum() == 4 * COUNT
    for example in range(100):
        pairs = dict(zip(shown[1:9:3, example], shown[2:9:3, example], strict=True))
        assert len(pairs) == PAIRS and pairs[shown[-1, example]] == labels[example]


def test_the_gap_is_a_piece_of_the_text(sequences):
    shown, _ = sequences
    text, seen = np.asarray(TEXT).tolist(), set()
    windows = [text[i : i + GAP] for i in range(len(text) - GAP + 1)]
    for example in range(100):
        piece = shown[3 * PAIRS : -2, example].tolist()
        assert piece in windows
        seen.add(tuple(piece))
    assert len(seen) > 10


def test_keys_values_and_questions_are_drawn_fairly(sequences):
    shown, labels = sequences
    values = text_recall.VALUES
    bound = five_standard_errors(text_recall.CHANCE, COUNT)
    for drawn in (labels, shown[1], shown[2], shown[-1]):
        assert drawn.max() < values
        assert np.abs(np.bincount(drawn, minlength=values) / COUNT - 1 / values).max() < bound
    asked = (shown[1:9:3] == shown[-1]).mean(axis=1)
    assert np.abs(asked - 1 / PAIRS).max() < five_standard_errors(1 / PAIRS, COUNT)
    # Another pair, and the key itself, agree with the answer by chance alone.
    others = np.where(shown[1] == shown[-1], shown[5], shown[2])
    for guess in (others, shown[-1]):
        assert abs((guess == labels).mean() - text_recall.CHANCE) < bound


@pytest.mark.mixed_promotion
def test_a_gap_longer_than_the_held_out_text_is_refused_before_training(tmp_path):
    (tmp_path / "short.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    options = [f"--config.text_recall.path={tmp_path / 'short.txt'}", "--config.text_recall.size=20"]

    def make(gap):
        config, _ = settings.read(["--config=configs/text_recall.py", *options, f"--config.text_recall.gap={gap}"])
        return settings.make(config)

    assert make(66).length == 3 + 66 + 2  # 66 characters are held out
    with pytest.raises(Refused, match=r"66 characters of text.*gap=67"):
        make(67)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 17}, "16 keys .*pairs=17"),
        ({"gap": 501}, "500 characters .*gap=501"),
        ({"gap": 0}, "gap must be an integer >= 1; seen 0"),
        ({"size": 16}, "size must be an integer >= 17; seen 16"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_recall.sample(jax.random.key(0), TEXT, **{"size": SIZE, "batch": 4, **arguments})
