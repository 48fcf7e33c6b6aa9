"""Let a network that the training program has trained on a text write on.

    python -m experiments.training.write FOLDER [--prompt TEXT] [--characters 400] [--temperature 1.0] [--seed 0]

FOLDER is the ``--workdir`` of a run of the task "text"; its newest checkpoint is used, and the alphabet of the text
that the configuration names, which must be as it was. The network reads the prompt from its initial carry, then reads
what it writes: each character is drawn from softmax(y_t / temperature).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax import Cell
from experiments.program.command import Parser, keep_compiled
from experiments.program.refusal import Refused
from experiments.tasks import text
from experiments.training.train import trained

PyTree = Any


class Writer(NamedTuple):
    """A network that reads and writes characters.

    Attributes:
      network: (batch, size) one-hot to logits (batch, size).
      params: of the network.
      size: of the one-hot inputs and of the logits.
      alphabet: the character of each number; at most ``size``.
    """

    network: Cell
    params: PyTree
    size: int
    alphabet: str


def write(writer: Writer, prompt: str, characters: int, temperature: float, key: jax.Array) -> str:
    """What a network writes after a prompt.

    Args:
      prompt: at least one character.
      characters: how many to write.
      temperature: of the softmax, above 0; small: the likeliest character nearly every time.
    """
    apply = jax.vmap(writer.network.apply, in_axes=(None, 0, 0))
    letters = len(writer.alphabet)

    def read(carry: PyTree, character: jax.Array) -> tuple[PyTree, jax.Array]:
        carry, y = apply(writer.params, carry, jax.nn.one_hot(character[None], writer.size, dtype=jnp.float32))
        return carry, y[0, :letters]

    def step(so_far: tuple[PyTree, jax.Array], key: jax.Array) -> tuple[tuple[PyTree, jax.Array], jax.Array]:
        carry, logits = so_far
        character = jax.random.categorical(key, logits / temperature)
        return read(carry, character), character

    _, carry = writer.network.init(jax.random.key(0), jnp.zeros((1, writer.size), jnp.float32))
    carry, logits = jax.lax.scan(read, carry, text.numbers(prompt, writer.alphabet))
    _, written = jax.lax.scan(step, (carry, logits[-1]), jax.random.split(key, characters))
    return "".join(writer.alphabet[number] for number in written.tolist())


def writer_of(folder: Path) -> Writer:
    """The network of a run of the task "text", with the parameters of its newest checkpoint.

    Raises:
      Refused: there is no such run in the folder, or no checkpoint yet.
    """
    setting, params = trained(folder, "text")
    options = setting.config.text
    alphabet = text.load(options.path, options.size).alphabet
    return Writer(setting.task.network, params, options.size, alphabet)


def main(arguments: list[str] | None = None) -> int:
    """Print the prompt and what comes after it; returns the exit status, 2 for what is refused."""
    parser = Parser("experiments.training.write", __doc__)
    parser.add_argument("folder", type=Path, help="the --workdir of a run of the task 'text'")
    parser.add_argument("--prompt", default="\n", help="what the network reads first")
    parser.add_argument("--characters", type=int, default=400, help="how many to write")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier characters more often")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        if not options.prompt or options.characters < 1 or options.temperature <= 0:
            raise Refused(
                "Needed: a prompt of at least one character, --characters of at least 1, --temperature above 0; seen "
                f"{options.prompt!r}, {options.characters} and {options.temperature}."
            )
        writer = writer_of(options.folder)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unknown = sorted(set(options.prompt) - set(writer.alphabet))
    if unknown:
        print(f"Not in the alphabet, and read as one and the same character: {unknown}.", file=sys.stderr)
    key = jax.random.key(options.seed)
    print(options.prompt + write(writer, options.prompt, options.characters, options.temperature, key))
    return 0


if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
