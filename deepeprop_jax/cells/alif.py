"""Leaky integrate-and-fire units with an adaptive threshold."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.cells.lif import current, refractory_carry, refractory_steps, spiking_kernels
from deepeprop_jax.cells.spike import fire
from deepeprop_jax.network.cell import Cell, PyTree, remade


def alif(
    features: int,
    *,
    recurrent: bool = True,
    tau: float = 20.0,
    tau_adaptation: float = 200.0,
    beta: float = 0.2,
    dt: float = 1.0,
    threshold: float = 1.0,
    dampening: float = 0.3,
    refractory: float = 0.0,
    detach_reset: bool = False,
    param_dtype: Any = jnp.float32,
) -> Cell:
    """Adaptive leaky integrate-and-fire network: each spike raises the unit's own threshold for a while.

    α   = exp(-dt / τ)        ρ = exp(-dt / τ_a)
    a_t = ρ a_{t-1} + z_{t-1}
    v_t = α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}        W_rec without its diagonal
    z_t = H(v_t - threshold - β a_t), and 0 while refractory                   y_t = z_t

    H is ``triangular_spike`` of (v_t - threshold - β a_t) / threshold. *Gradient of the reset*: as in ``lif``;
    ``detach_reset`` concerns the reset alone, not the z_{t-1} that drives the adaptation.

    With ``recurrent=False`` there is no W_rec, and the cell is element-wise in its carry: deep e-prop is exact for it.

    *Units*: ``tau``, ``tau_adaptation``, ``dt`` and ``refractory`` in the same unit, ms by convention.

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_kernel`` (features, features); carry (v, a, z),
    each (features,), and with a refractory period (v, a, z, count), the last int32, which
    is the period in steps plus one at a spike, and falls to 0.

    *Initialisation*: kernels normal with variance 1 / fan-in; v = a = z = 0.

    Args:
      features: number of units.
      recurrent: with lateral weights.
      tau: membrane time constant τ.
      tau_adaptation: time constant τ_a of the threshold; about the time that the task must be remembered.
      beta: rise of the threshold per spike, in the unit of v; 0 gives ``lif``.
      dt: length of one step.
      threshold: firing threshold at rest, in the unit of v.
      dampening: height of the surrogate derivative, γ_pd in the paper.
      refractory: refractory period; rounded up to whole steps; 0 for none.
      detach_reset: no gradient through the reset.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; a time constant, ``dt`` or ``threshold`` not above 0; ``beta`` or ``refractory``
        below 0.

    Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11, 3625 (2020), Methods: network models, and the pseudo-derivative.

    >>> cell = alif(4)
    >>> params, (v, a, z) = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> v.shape, list(params)
    ((3, 4), ['input_kernel', 'recurrent_kernel'])
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(tau=tau, tau_adaptation=tau_adaptation, dt=dt, threshold=threshold)
    if beta < 0:
        raise ValueError(f"beta raises the threshold, and must not be below 0; seen {beta!r}.")
    period = refractory_steps(refractory, dt)
    alpha, rho = math.exp(-dt / tau), math.exp(-dt / tau_adaptation)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = spiking_kernels(key, input_size("alif", x), features, recurrent, param_dtype)
        v = zeros_carry(x, features, param_dtype)
        return params, (v, v, v, *refractory_carry(v, period))

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        v_tm1, a_tm1, z_tm1, *left = carry_tm1
        a_t = rho * a_tm1 + z_tm1
        v_t = alpha * v_tm1 + current(params, z_tm1, x_t, threshold, detach_reset)
        distance = (v_t - threshold - beta * a_t) / threshold
        z_t, *left = fire(distance, left[0] if left else None, period, dampening)
        return (v_t, a_t, z_t, *left), z_t

    return remade(Cell(init, apply), alif, **arguments)
