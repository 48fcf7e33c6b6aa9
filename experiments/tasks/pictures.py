"""Draw one example of each task: ``docs/tasks/<task>.png``.

    python -m experiments.tasks.pictures [--out docs/tasks]

Above, the inputs over time, one row for each input; below, the label at the steps where it is asked for, on bars as
high as the weight of the step in the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.progress import track

from experiments.program.command import Parser, keep_compiled
from experiments.program.pictures import INK, open_axes, pyplot, save
from experiments.tasks import digits, evidence, motifs, recall, series, text, text_recall, xor_count
from experiments.tasks.targets import Targets


def _digits(pixels_per_step: int) -> tuple[jax.Array, Targets]:
    _, test = digits.load()
    return digits.sequences(jax.tree.map(lambda part: part[:1], test), 32, pixels_per_step)


def _series(name: str) -> tuple[jax.Array, Targets]:
    train, _, _ = series.load(name)
    xs, targets = series.sequences(jax.tree.map(lambda part: part[:1], train))
    return xs / 3, targets


def _text() -> tuple[jax.Array, Targets]:
    corpus = text.load()
    return text.sample(np.int32(0), corpus.train, len(corpus.alphabet), batch=1, steps=32)


def _text_recall() -> tuple[jax.Array, Targets]:
    corpus = text.load()
    return text_recall.sample(jax.random.key(0), corpus.train, len(corpus.alphabet), 1)


PICTURES: dict[str, tuple[str, Callable[[], tuple[jax.Array, Targets]]]] = {
    "xor_count": ("XOR-count, silent delay", partial(xor_count.sample, jax.random.key(0), 1, delay=30)),
    "xor_count_distractors": (
        "XOR-count, distractors",
        partial(xor_count.sample, jax.random.key(0), 1, delay=30, distractors=True),
    ),
    "motifs": ("classify, then count", partial(motifs.sample, jax.random.key(0), 1)),
    "recall": ("delayed recall", partial(recall.sample, jax.random.key(0), 1)),
    "evidence": ("evidence accumulation", partial(evidence.sample, jax.random.key(0), 1)),
    "japanese_vowels": ("Japanese vowels, ±3 standard deviations", partial(_series, "JapaneseVowels")),
    "basic_motions": ("basic motions, ±3 standard deviations", partial(_series, "BasicMotions")),
    "text": ("text, the next character", _text),
    "text_recall": ("recall in a text", _text_recall),
    "digits_rows": ("digits by rows, then 32 blank steps", partial(_digits, 8)),
    "digits_pixels": ("digits by pixels, then 32 blank steps", partial(_digits, 1)),
}
"""The title of each picture, and how its example is made."""


def draw(title: str, xs: jax.Array, targets: Targets, path: Path) -> None:
    """Write the picture of the first example of a batch to ``path``."""
    inputs, label, weight = (np.asarray(part)[:, 0] for part in (xs, targets.label, targets.weight))
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(6.4, 2.8), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    image = above.imshow(inputs.T, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=above, ticks=(-1, 0, 1))
    above.set_ylabel("input")
    channels = inputs.shape[1]
    above.set_yticks(range(0, channels, 1 if channels < 4 else 2 if channels < 20 else 10))
    above.set_title(f"{title}: T = {len(inputs)}", loc="left", fontsize=10)
    below.bar(np.arange(len(inputs)), weight, color=INK)
    for step in np.flatnonzero(weight):
        answer = "\n".join(str(part) for part in np.atleast_1d(label[step]))
        style = {"ha": "center", "va": "bottom", "fontsize": 9 if label.ndim == 1 else 6}
        below.annotate(answer, (step, weight[step]), (0, 2), textcoords="offset points", **style)
    below.set_ylim(0, 2.2 * weight.max())
    below.set_ylabel("weight,\nlabel")
    below.set_yticks((0, round(float(weight.max()), 3)))
    below.set_xlabel("step")
    open_axes(below)
    save(figure, path, dpi=90)


def main(arguments: list[str] | None = None) -> None:
    """Draw all pictures."""
    parser = Parser("experiments.tasks.pictures", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/tasks"), help="folder for <task>.png")
    out = parser.parse_args(arguments).out
    for task, (title, example) in track(PICTURES.items(), "pictures"):
        try:
            draw(title, *example(), out / f"{task}.png")
        except series.NoRecordings as error:
            print(f"{task} is left out: {error}")


if __name__ == "__main__":
    keep_compiled()
    main()
