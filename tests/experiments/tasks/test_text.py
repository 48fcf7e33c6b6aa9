"""The text task: streams that go on from batch to batch, its alphabet, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell
from experiments.program.refusal import Refused
from experiments.tasks import text
from experiments.training import settings, train, write


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("abcab" * 250 + "é!", encoding="utf-8")
    return text.load(str(path), size=3)


def test_the_alphabet_is_that_of_the_training_part_by_frequency(corpus):
    assert corpus.alphabet == "ab" + text.OTHER
    assert len(corpus.train) == int(0.95 * 1252) and len(corpus.train) + len(corpus.held_out) == 1252
    assert corpus.train[:5].tolist() == [0, 1, 2, 0, 1]
    assert corpus.held_out[-2:].tolist() == [2, 2]


@pytest.mark.mixed_promotion
def test_streams_go_on_from_batch_to_batch_and_round_at_the_end(corpus):
    batch, steps, stream = 4, 25, len(corpus.train) // 4
    seen, last_label = [], None
    for index in range(stream // steps + 2):
        xs, targets = text.sample(jnp.int32(index), corpus.train, 3, batch=batch, steps=steps)
        assert xs.shape == (steps, batch, 3) and targets.label.shape == targets.weight.shape == (steps, batch)
        np.testing.assert_array_equal(xs.sum(-1), 1)
        np.testing.assert_allclose(targets.weight.sum(0), 1, rtol=1e-6)
        shown = np.asarray(xs).argmax(-1)
        np.testing.assert_array_equal(targets.label[:-1], shown[1:])
        if last_label is not None:
            np.testing.assert_array_equal(last_label, shown[0])
        last_label = targets.label[-1]
        seen.append(shown)
    joined = np.concatenate(seen)
    streams = np.asarray(corpus.train)[: batch * stream].reshape(batch, stream).T
    np.testing.assert_array_equal(joined[:stream], streams)
    np.testing.assert_array_equal(joined[stream:], streams[: len(joined) - stream])


@pytest.mark.slow
def test_the_text_of_python_and_what_tables_of_its_characters_cost():
    corpus = text.load()
    assert len(corpus.train) > 300_000 and len(corpus.alphabet) == 96
    assert "\n" in corpus.alphabet and "e" in corpus.alphabet[:3]
    assert int((corpus.train == 95).sum()) < 0.001 * len(corpus.train)
    # The statistics that the task's documentation gives; a character is worth something.
    # Those of docs/logs/experiments/text.md, which are of Python 3.11; the text of Python 3.13 is off by 0.12 at most.
    bits = [text.bits_of_order(corpus, order) for order in range(5)]
    assert bits == pytest.approx([4.58, 3.24, 2.37, 1.90, 1.77], abs=0.15)


def test_a_table_of_more_characters_knows_more(tmp_path):
    (tmp_path / "regular.txt").write_text("abcab" * 250)
    corpus = text.load(str(tmp_path / "regular.txt"), size=4)
    # What comes after "ab" is "c" or "a"; after "cab" and after "bab" it is certain.
    two, three = (text.bits_of_order(corpus, order) for order in (2, 3))
    assert 0.35 < two < 0.45 and three < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config.text.path=absent.txt"], "absent.txt"),
        (["--config.text.batch=100000"], "Give a longer text"),
        (["--config.text.size=1"], "size"),
    ],
)
def test_what_is_refused(options, words):
    config, _ = settings.read(["--config=configs/text.py", *options])
    with pytest.raises(Refused, match=words):
        settings.make(config)


def test_a_short_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(ValueError, match="3 characters"):
        text.load(str(tmp_path / "short.txt"))


def test_a_network_reads_the_prompt_and_then_what_it_writes():
    """One that expects the number two above that of the one before last."""

    def apply(sure, before, x):
        return x, sure * jnp.roll(before, 2)

    cell = Cell(lambda key, x: (jnp.float32(5), jnp.zeros_like(x)), apply)
    writer = write.Writer(cell, jnp.float32(5), 6, "abcd")

    def after(prompt, characters, temperature, seed=0):
        return write.write(writer, prompt, characters, temperature, jax.random.key(seed))

    # Of the six numbers two are no characters and never written.
    assert after("aa", 1, 1e-3) == "c" and after("ba", 1, 1e-3) == "d" and after("ab", 2, 1e-3) == "cd"
    assert {after("aa", 1, 1e3, seed) for seed in range(40)} == set("abcd")


@pytest.mark.mixed_promotion
def test_a_trained_network_writes_from_its_newest_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    (tmp_path / "regular.txt").write_text("abc" * 700)
    options = {"path": tmp_path / "regular.txt", "size": 5, "features": 8, "layers": 1, "batch": 4, "steps": 10}
    fields = [f"--config.text.{name}={value}" for name, value in options.items()]
    lengths = ["--config.batches=60", "--config.evaluate_every=60", "--config.checkpoint_every=60"]
    arguments = ["--config=configs/text.py", "--config.rule=BPTT", "--config.learning_rate=0.1", *lengths, *fields]
    assert write.main([str(folder)]) == 2 and "no run" in capsys.readouterr().err
    assert train.main([*arguments, f"--workdir={folder}"]) == 0
    capsys.readouterr()
    assert write.main([str(folder), "--prompt=abcab", "--characters=7", "--temperature=0.1"]) == 0
    assert capsys.readouterr() == ("abcab" + "cabcabc" + "\n", "")
    assert write.main([str(folder), "--prompt=x", "--characters=1"]) == 0 and "['x']" in capsys.readouterr().err
    assert write.main([str(folder), "--prompt="]) == 2 and "at least one character" in capsys.readouterr().err
    (folder / "checkpoints" / "60").rename(tmp_path / "elsewhere")
    assert write.main([str(folder)]) == 2 and "no checkpoint" in capsys.readouterr().err
