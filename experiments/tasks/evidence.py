"""Evidence accumulation: on which side were more cues? Spikes in, and the answer after a long silence.

    steps (of 10 ms)                neurons that fire at 40 Hz
    cues · (10, then 5 of a gap)    10 of the left or 10 of the right, while the cue lasts
    ``delay``                       none
    ``recall``, 15                  10 that ask for the answer

    length of all      T = 15 · cues + delay + recall         (225 with 7 cues and a delay of 105)

10 more neurons fire at 10 Hz all the time and say nothing. A spike is a 1 at a step, drawn independently with the
probability rate · dt. In a trial one side, chosen by a fair coin, is the likelier: each cue is on it with probability
0.7. The label is the side of more cues, of the 7 that were drawn. It is asked for at all recall steps, with weight
1 / recall each.

What it asks for: adding up over 1.5 s, and keeping the sum for 1 s, with neurons that forget in 20 ms but whose
thresholds adapt for 2 s.

*Shapes*: xs (T, batch, 40) float32, spikes; targets.label (T, batch) int32, 0 left and 1 right; targets.weight
(T, batch) float32.

*Chance level*: 0.5.

*A perfect solver*: nearly 1.0: a cue is 10 neurons in 10 steps at 40 Hz, some 40 spikes, where the other side has none.

*Source*: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
Communications 11, 3625 (2020), after A. Morcos and C. Harvey, Nature Neuroscience 19, 1672 (2016); here at dt = 10 ms,
and with a delay of one length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.arguments import check_at_least
from experiments.tasks.targets import Targets

CLASSES = 2
CHANCE = 1 / CLASSES
DT = 10.0
"""ms of a step."""
GROUP = 10
"""Neurons that fire together: left, right, asking, noise."""
CUE, GAP = 10, 5
LIKELIER = 0.7
RATE, NOISE = 40.0, 10.0
"""Hz."""


def sample(
    key: jax.Array, batch: int, *, cues: int = 7, delay: int = 105, recall: int = 15
) -> tuple[jax.Array, Targets]:
    """``batch`` fresh trials.

    Raises:
      ValueError: an even number of cues (they could tie), or sizes below 1 (delay: below 0).
    """
    check_at_least(1, batch=batch, cues=cues, recall=recall)
    check_at_least(0, delay=delay)
    if cues % 2 == 0:
        raise ValueError(f"Evidence needs an odd number of cues; seen cues={cues}.")
    side_key, cue_key, spike_key = jax.random.split(key, 3)
    side = jax.random.bernoulli(side_key, 0.5, (batch, 1))
    on_side = jax.random.bernoulli(cue_key, LIKELIER, (batch, cues))
    right = jnp.where(side, on_side, ~on_side)
    label = (right.sum(1) > cues // 2).astype(jnp.int32)

    shown = jnp.arange(CUE + GAP) < CUE
    by_step = jnp.repeat(right.T, CUE + GAP, axis=0)  # (15 · cues, batch)
    lasts = jnp.tile(shown, cues)[:, None]
    steps = len(by_step) + delay + recall
    left_on, right_on = (jnp.pad(lasts & on, ((0, delay + recall), (0, 0))) for on in (~by_step, by_step))
    asking = jnp.broadcast_to(jnp.arange(steps)[:, None] >= steps - recall, left_on.shape)
    rates = [jnp.where(on, RATE, 0.0) for on in (left_on, right_on, asking)] + [jnp.full(left_on.shape, NOISE)]
    probability = jnp.repeat(jnp.stack(rates, -1) * DT / 1000, GROUP, axis=-1)
    xs = jax.random.bernoulli(spike_key, probability).astype(jnp.float32)
    weight = jnp.zeros((steps, batch), jnp.float32).at[-recall:].set(1 / recall)
    return xs, Targets(jnp.broadcast_to(label, weight.shape), weight)
