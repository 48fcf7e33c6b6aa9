"""XOR-count: a credit assignment problem through depth *and* time, of which neither half can be left out.

``cues`` cue steps, ``gap`` steps apart, then a ``delay``. A cue shows x ∈ {−1, +1}^width, fair and independent; the
steps between cues show zeros. Only x_0 and x_1 matter: the cue's vote is x_0 · x_1, and the label is the sign of the
sum of votes (``cues`` is odd), asked for at the last step only.

    cue steps     t = 0, gap, 2 gap, ..., (cues − 1) gap
    delay steps   t = cues · gap, ..., T − 1
    length        T = cues · gap + delay
    label         [Σ_cues x_0 x_1 > 0]

With ``running`` the label of a step is the sign of the votes so far, and it is asked for at every step at which these
are odd in number and no cue is shown, with equal weights that sum to 1. Then a learner hears of the votes all along, as
updates inside a sequence need, and a vote is still heard of only through the memory.

The delay is silent (zeros), or shows distractors: x ∈ {−1, +1}^width again, but with one of x_0 and x_1, drawn anew at
each step, set to 0. A distractor's vote x_0 · x_1 is therefore 0, so the label stays what the cues say. A layer that
remembers its last input is overwritten by distractors, and not by silence.

Why it is hard: a vote is uncorrelated with every odd function of the inputs, such as a linear one or a tanh layer with
zero biases, so a linear integrator above an untrained layer sees nothing to integrate. The feature must be formed in
a layer without memory, up to T steps before the loss.

*Shapes*: xs (T, batch, width) float32; targets.label (T, batch) int32; targets.weight (T, batch) float32, without
``running`` 1 at the last step and 0 elsewhere.

*Chance level*: 0.5.

*A perfect solver*: 1.0; the sum of x_0 · x_1 over all steps has the sign of the label.

*Source*: this repository.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets, at_last_step

CLASSES = 2
CHANCE = 1 / CLASSES


def sample(
    key: jax.Array,
    batch: int,
    *,
    cues: int = 5,
    gap: int = 3,
    delay: int = 10,
    width: int = 8,
    distractors: bool = False,
    running: bool = False,
) -> tuple[jax.Array, Targets]:
    """``batch`` fresh sequences. The cues of a key are the same with distractors and without.

    Raises:
      ValueError: an even number of cues (votes could tie), fewer than two inputs, sizes below 1 (delay: below 0), or
        a running label without a step to ask for it.
    """
    check_at_least(1, batch=batch, cues=cues, gap=gap)
    check_at_least(0, delay=delay)
    if running and cues * gap + delay == cues:
        raise ValueError(
            "A running label is asked for between cues or after them; needed: gap above 1, or a delay; "
            f"seen gap={gap}, delay={delay}."
        )
    if cues % 2 == 0 or width < 2:
        raise ValueError(f"XOR-count needs an odd number of cues and width >= 2; seen cues={cues}, width={width}.")
    cue = jax.random.rademacher(key, (cues, batch, width), jnp.float32)
    xs = jnp.zeros((cues * gap + delay, batch, width), jnp.float32).at[: cues * gap : gap].set(cue)
    if distractors:
        xs = xs.at[cues * gap :].set(_distractors(jax.random.fold_in(key, 1), (delay, batch, width)))
    votes = jnp.cumsum(cue[..., 0] * cue[..., 1], axis=0)
    if not running:
        return xs, at_last_step((votes[-1] > 0).astype(jnp.int32), len(xs))
    step = jnp.arange(len(xs))
    before = jnp.minimum(step // gap, cues - 1)  # cues before the newest one
    asked = (before % 2 == 0) & ((step % gap > 0) | (step >= cues * gap))
    weight = jnp.broadcast_to((asked / asked.sum())[:, None], (len(xs), batch)).astype(jnp.float32)
    return xs, Targets((votes[before] > 0).astype(jnp.int32), weight)


def _distractors(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Fair signs, of which x_0 or x_1 is set to 0."""
    sign_key, zero_key = jax.random.split(key)
    zeroed = jax.random.randint(zero_key, shape[:2], 0, 2)
    return jax.random.rademacher(sign_key, shape, jnp.float32) * (
        1 - jax.nn.one_hot(zeroed, shape[2], dtype=jnp.float32)
    )
