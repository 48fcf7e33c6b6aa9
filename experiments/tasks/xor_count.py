"""XOR-count: a credit assignment problem through depth *and* time, of which neither half can be left out.

``cues`` cue steps, ``gap`` steps apart, then a silent ``delay``. A cue shows x ∈ {−1, +1}^width, fair and independent;
every other step shows zeros. Only x_0 and x_1 matter: the cue's vote is x_0 · x_1, and the label is the sign of the sum
of votes (``cues`` is odd), asked for at the last step only.

    cue steps     t = 0, gap, 2 gap, ..., (cues − 1) gap
    length        T = cues · gap + delay
    label         [Σ_cues x_0 x_1 > 0]

Why it is hard: a vote is uncorrelated with every odd function of the inputs, such as a linear one or a tanh layer with
zero biases, so a linear integrator above an untrained layer sees nothing to integrate. The feature must be formed in
a layer without memory, up to T steps before the loss.

*Shapes*: xs (T, batch, width) float32; targets.label (T, batch) int32; targets.weight (T, batch) float32, 1 at the last
step and 0 elsewhere.

*Chance level*: 0.5.

*Source*: this repository.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.targets import Targets, at_last_step

CLASSES = 2
CHANCE = 1 / CLASSES


def sample(
    key: jax.Array, batch: int, *, cues: int = 5, gap: int = 3, delay: int = 10, width: int = 8
) -> tuple[jax.Array, Targets]:
    """``batch`` fresh sequences.

    Raises:
      ValueError: an even number of cues (votes could tie), or fewer than two inputs.
    """
    if cues % 2 == 0 or width < 2:
        raise ValueError(f"XOR-count needs an odd number of cues and width >= 2; seen cues={cues}, width={width}.")
    cue = jax.random.rademacher(key, (cues, batch, width), jnp.float32)
    xs = jnp.zeros((cues * gap + delay, batch, width), jnp.float32).at[: cues * gap : gap].set(cue)
    votes = jnp.sum(cue[..., 0] * cue[..., 1], axis=0)
    return xs, at_last_step((votes > 0).astype(jnp.int32), len(xs))
