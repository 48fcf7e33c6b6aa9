"""Spiking units: the spike and its surrogate derivative, leaky integrate-and-fire units, and adaptive ones.

Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
Communications 11, 3625 (2020), Methods: network models, and the pseudo-derivative.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def triangular_spike(distance: jax.Array, dampening: float = 0.3) -> jax.Array:
    """Heaviside step with a triangular surrogate derivative, for both modes of differentiation.

    z = 1 where distance > 0, else 0        dz/d(distance) := dampening · max(0, 1 - |distance|)

    Args:
      distance: membrane potential above threshold, in units of the base threshold: (v - A) / v_th.
      dampening: height of the surrogate, γ_pd in the paper.

    Returns:
      The spikes, in the dtype of ``distance``.

    Reference: Bellec et al. (2020), Methods: pseudo-derivative ψ = (γ_pd / v_th) max(0, 1 - |(v - A) / v_th|).

    >>> spike = lambda distance: triangular_spike(distance, 0.5)
    >>> jax.vmap(jax.grad(spike))(jnp.array([-0.5, 0.5, 2.0])).tolist()
    [0.25, 0.25, 0.0]
    """
    return (distance > 0).astype(distance.dtype)


@triangular_spike.defjvp
def _triangular_spike_jvp(
    dampening: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (distance,), (tangent,) = primals, tangents
    surrogate = dampening * jnp.maximum(0, 1 - jnp.abs(distance))
    return triangular_spike(distance, dampening), surrogate * tangent


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
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Leaky integrate-and-fire network with a triangular surrogate gradient.

    α   = exp(-dt / τ)
    v_t = α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}        W_rec without its diagonal
    z_t = H(v_t - threshold), and 0 while refractory                           y_t = z_t

    H is ``triangular_spike`` of (v_t - threshold) / threshold. *Gradient of the reset*: a subtraction, whose
    z_{t-1} is differentiated like any other, through the surrogate; ``detach_reset=True`` takes it as a constant, so
    that ∂v_t/∂v_{t-1} = α, as in the eligibility traces of the paper (Bellec et al., 2020).

    With ``recurrent=False`` there is no W_rec, and the cell is element-wise in its carry: deep e-prop is exact for it.

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_kernel`` (features, features); carry (v, z), each
    (features,), and with a refractory period (v, z, count), the last int32, which
    is the period in steps plus one at a spike, and falls to 0.

    *Initialisation*: kernels normal with variance 1 / fan-in; v = z = 0.

    Args:
      features: number of units.
      recurrent: with lateral weights.
      tau, dt: membrane time constant τ and length of one step; with ``refractory`` in one unit, ms by convention.
      threshold: firing threshold, in the unit of v.
      dampening: height of the surrogate derivative, γ_pd in the paper.
      refractory: refractory period; rounded up to whole steps; 0 for none.
      detach_reset: no gradient through the reset.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``tau``, ``dt`` or ``threshold`` not above 0; ``refractory`` below 0.

    >>> cell = lif(4, recurrent=False)
    >>> params, (v, z) = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> v.shape, list(params)
    ((3, 4), ['input_kernel'])
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(tau=tau, dt=dt, threshold=threshold)
    period = _whole_steps(refractory, dt)
    alpha = math.exp(-dt / tau)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = _kernels(key, input_size("lif", x), features, recurrent, param_dtype)
        v = zeros_carry(x, features, param_dtype)
        return params, (v, v, *_refractory_carry(v, period))

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        v_tm1, z_tm1, *left = carry_tm1
        v_t = alpha * v_tm1 + _current(params, z_tm1, x_t, threshold, detach_reset)
        z_t, *left = _fire((v_t - threshold) / threshold, left, period, dampening)
        return (v_t, z_t, *left), z_t

    return remade(Cell(init, apply), lif, **arguments)


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
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Adaptive leaky integrate-and-fire network: each spike raises the unit's own threshold for a while.

    α   = exp(-dt / τ)        ρ = exp(-dt / τ_a)
    a_t = ρ a_{t-1} + z_{t-1}
    v_t = α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}        W_rec without its diagonal
    z_t = H(v_t - threshold - β a_t), and 0 while refractory                   y_t = z_t

    H is ``triangular_spike`` of (v_t - threshold - β a_t) / threshold. All else is as in ``lif``; ``detach_reset``
    concerns the reset alone, not the z_{t-1} that drives the adaptation.

    *Shapes*: params as in ``lif``; carry (v, a, z), each (features,), and with a refractory period (v, a, z, count).

    *Initialisation*: as ``lif``; a = 0.

    Args:
      features, recurrent, tau, dt, dampening, refractory, detach_reset, param_dtype: as in ``lif``.
      tau_adaptation: time constant τ_a of the threshold; about the time that the task must be remembered.
      beta: rise of the threshold per spike, in the unit of v; 0 gives ``lif``.
      threshold: firing threshold at rest, in the unit of v.

    Raises:
      ValueError: as ``lif``; ``tau_adaptation`` not above 0; ``beta`` below 0.

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
    period = _whole_steps(refractory, dt)
    alpha, rho = math.exp(-dt / tau), math.exp(-dt / tau_adaptation)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = _kernels(key, input_size("alif", x), features, recurrent, param_dtype)
        v = zeros_carry(x, features, param_dtype)
        return params, (v, v, v, *_refractory_carry(v, period))

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        v_tm1, a_tm1, z_tm1, *left = carry_tm1
        a_t = rho * a_tm1 + z_tm1
        v_t = alpha * v_tm1 + _current(params, z_tm1, x_t, threshold, detach_reset)
        z_t, *left = _fire((v_t - threshold - beta * a_t) / threshold, left, period, dampening)
        return (v_t, a_t, z_t, *left), z_t

    return remade(Cell(init, apply), alif, **arguments)


def _whole_steps(refractory: float, dt: float) -> int:
    """A refractory period in whole steps; the small number keeps 3 · 0.1 / 0.1 at 3."""
    if refractory < 0:
        raise ValueError(f"refractory is a time, 0 for none; seen {refractory!r}.")
    return math.ceil(refractory / dt - 1e-9)


def _refractory_carry(v: jax.Array, period: int) -> tuple[jax.Array, ...]:
    return (jnp.zeros(v.shape, jnp.int32),) if period else ()


def _kernels(key: jax.Array, inputs: int, features: int, recurrent: bool, param_dtype: DTypeLike) -> PyTree:
    """Input weights, and lateral ones where there are any; normal, variance 1 / fan-in."""
    input_key, recurrent_key = jax.random.split(key)
    params = {"input_kernel": jax.random.normal(input_key, (inputs, features), param_dtype) / math.sqrt(inputs)}
    if recurrent:
        lateral = jax.random.normal(recurrent_key, (features, features), param_dtype)
        params["recurrent_kernel"] = lateral / math.sqrt(features)
    return params


def _current(params: PyTree, z_tm1: jax.Array, x_t: jax.Array, threshold: float, detach_reset: bool) -> jax.Array:
    """What enters the membrane: x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}."""
    total = x_t @ params["input_kernel"] - threshold * (jax.lax.stop_gradient(z_tm1) if detach_reset else z_tm1)
    if "recurrent_kernel" in params:
        lateral = params["recurrent_kernel"]
        # A unit has no synapse onto itself.
        total = total + z_tm1 @ (lateral * (1 - jnp.eye(lateral.shape[0], dtype=lateral.dtype)))
    return total


def _fire(distance: jax.Array, left: list[jax.Array], period: int, dampening: float) -> tuple[jax.Array, ...]:
    """Spikes, and, where there is a refractory period, how long it lasts.

    The count is period + 1 at a spike and falls by one a step, to 0: at a step with a count of 1 to ``period`` the unit
    cannot fire, whatever its potential, and the surrogate derivative is 0. So the new carry tells all that decides a
    spike, its derivative included, and a spike needs no trace of its own.

    Args:
      left: the count of the step before, where there is a refractory period; else empty.
    """
    z_t = triangular_spike(distance, dampening)
    if not left:
        return (z_t,)
    fires = (distance > 0) & (left[0] <= 1)
    refractory_t = jnp.where(fires, jnp.int32(period + 1), jnp.maximum(left[0] - 1, 0))
    resting = (refractory_t > 0) & (refractory_t <= period)
    return jnp.where(resting, jnp.zeros_like(z_t), z_t), refractory_t
