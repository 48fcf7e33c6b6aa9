"""The network of actor and critic: two recurrent layers, whose upper one both read."""

from __future__ import annotations

import flax.linen as nn

from deepeprop_jax import Cell, stack
from deepeprop_jax.cells import rtu


def two_layers(
    actions: int,
    features: int = 16,
    lower: tuple[float, float] = (0.0, 0.9),
    upper: tuple[float, float] = (0.95, 0.9995),
    max_phase: float = 0.3,
    readout: float = 1.0,
) -> Cell:
    """Two layers of recurrent trace units with a linear recurrence, and a dense layer: logits of the actions, then v.

    h ← r e^{iθ} h + γ W x        y = relu(h)        per unit, two numbers (``deepeprop_jax.cells.rtu``)

    The cell is the one made for this use (E. Elelimy et al., NeurIPS 2024). Its recurrence cannot run away, as |r| < 1
    whatever is learnt; it is element-wise, so deep e-prop's gradient is the exact one. It has no bias: the input has a
    number that is always 1 (``actor_critic.seen_by``).

    Args:
      actions: number of actions.
      features: units of a layer, of two numbers each.
      lower, upper: smallest and largest initial decay r per step of the two layers: about a step to ten steps, and
        twenty to two thousand.
      max_phase: largest initial angle θ per step, in radians.
      readout: what the dense layer's outputs are multiplied by, and so how fast they move beside the layers below.
    """
    layers = [rtu(features, linear=True, r_min=r[0], r_max=r[1], max_phase=max_phase) for r in (lower, upper)]
    return stack(*layers, nn.Dense(actions + 1), lambda y: readout * y)
