"""Leaky integrate-and-fire units."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.cells.spike import fire, without_self
from deepeprop_jax.network.cell import Cell, PyTree, remade


def lif(
    features: int,
    *,
    recurrent: bool = True,
    tau: float = 20.0,
    dt: float = 1.0,
    threshold: float = 1.0,
    dampening: float = 0.3,
    refractory: float = 0.0,
    detach_reset: bool = False,
    param_dtype: Any = jnp.float32,
) -> Cell:
    """Leaky integrate-and-fire network with a triangular surrogate gradient.

    α   = exp(-dt / τ)
    v_t = α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}        W_rec without its diagonal
    z_t = H(v_t - threshold), and 0 while refractory                           y_t = z_t

    H is ``triangular_spike`` of (v_t - threshold) / threshold. *Gradient of the reset*: a subtraction, whose
    z_{t-1} is differentiated like any other, through the surrogate; ``detach_reset=True`` takes it as a constant, so
    that ∂v_t/∂v_{t-1} = α, as in the eligibility traces of the paper.

    With ``recurrent=False`` there is no W_rec, and the cell is element-wise in its carry: deep e-prop is exact for it.

    *Units*: ``tau``, ``dt`` and ``refractory`` in the same unit, ms by convention.

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_kernel`` (features, features); carry (v, z), each
    (features,), and with a refractory period (v, z, count), the last int32, which
    is the period in steps plus one at a spike, and falls to 0.

    *Initialisation*: kernels normal with variance 1 / fan-in; v = z = 0.

    Args:
      features: number of units.
      recurrent: with lateral weights.
      tau: membrane time constant τ.
      dt: length of one step.
      threshold: firing threshold, in the unit of v.
      dampening: height of the surrogate derivative, γ_pd in the paper.
      refractory: refractory period; rounded up to whole steps; 0 for none.
      detach_reset: no gradient through the reset.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``tau``, ``dt`` or ``threshold`` not above 0; ``refractory`` below 0.

    Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11, 3625 (2020), Methods: network models, and the pseudo-derivative.

    >>> cell = lif(4, recurrent=False)
    >>> params, (v, z) = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> v.shape, list(params)
    ((3, 4), ['input_kernel'])
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(tau=tau, dt=dt, threshold=threshold)
    period = refractory_steps(refractory, dt)
    alpha = math.exp(-dt / tau)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = spiking_kernels(key, input_size("lif", x), features, recurrent, param_dtype)
        v = zeros_carry(x, features, param_dtype)
        return params, (v, v, *refractory_carry(v, period))

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        v_tm1, z_tm1, *left = carry_tm1
        v_t = alpha * v_tm1 + current(params, z_tm1, x_t, threshold, detach_reset)
        z_t, *left = fire((v_t - threshold) / threshold, left[0] if left else None, period, dampening)
        return (v_t, z_t, *left), z_t

    return remade(Cell(init, apply), lif, **arguments)


def refractory_steps(refractory: float, dt: float) -> int:
    """A refractory period in whole steps; the small number keeps 3 · 0.1 / 0.1 at 3."""
    if refractory < 0:
        raise ValueError(f"refractory is a time, 0 for none; seen {refractory!r}.")
    return math.ceil(refractory / dt - 1e-9)


def refractory_carry(v: jax.Array, period: int) -> tuple[jax.Array, ...]:
    """The carry leaf of a refractory period, where there is one."""
    return (jnp.zeros(v.shape, jnp.int32),) if period else ()


def spiking_kernels(key: jax.Array, inputs: int, features: int, recurrent: bool, param_dtype: Any) -> PyTree:
    """Input weights, and lateral ones where there are any; normal, variance 1 / fan-in."""
    input_key, recurrent_key = jax.random.split(key)
    params = {"input_kernel": jax.random.normal(input_key, (inputs, features), param_dtype) / math.sqrt(inputs)}
    if recurrent:
        lateral = jax.random.normal(recurrent_key, (features, features), param_dtype)
        params["recurrent_kernel"] = lateral / math.sqrt(features)
    return params


def current(params: PyTree, z_tm1: jax.Array, x_t: jax.Array, threshold: float, detach_reset: bool) -> jax.Array:
    """What enters the membrane: x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}."""
    reset = threshold * (jax.lax.stop_gradient(z_tm1) if detach_reset else z_tm1)
    total = x_t @ params["input_kernel"] - reset
    if "recurrent_kernel" in params:
        total = total + z_tm1 @ without_self(params["recurrent_kernel"])
    return total
