"""Spiking units: leaky integrate-and-fire units, and adaptive ones.

Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
Communications 11, 3625 (2020), Methods: network models.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.cells.surrogates import DAMPENING, SurrogateFunction, chosen_surrogate, spike
from deepeprop_jax.network.cell import Cell, PyTree, remade


class Reset(enum.Enum):
    """What a spike does to the potential of its unit at the next step."""

    SUBTRACT = "subtract"
    ZERO = "zero"
    NONE = "none"


class Membrane(NamedTuple):
    """How potentials move and where they make spikes.

    Attributes:
      alpha: share of the potential that is left after a step.
      threshold: at rest.
      low_pass: what enters is weighted by 1 - alpha.
      reset: what a spike does.
      detach_reset: no gradient through it.
      period: refractory period in steps.
      surrogate: derivative of a spike by its distance from the threshold.
    """

    alpha: float
    threshold: float
    low_pass: bool
    reset: Reset
    detach_reset: bool
    period: int
    surrogate: SurrogateFunction


def lif(
    features: int,
    *,
    recurrent: bool = True,
    tau: float = 20.0,
    dt: float = 1.0,
    threshold: float = 1.0,
    dampening: float = DAMPENING,
    surrogate: SurrogateFunction | None = None,
    low_pass: bool = False,
    reset: str = "subtract",
    detach_reset: bool = False,
    refractory: float = 0.0,
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Leaky integrate-and-fire network with a surrogate gradient.

        α   = exp(-dt / τ)
        v_t = α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}        W_rec without its diagonal
        z_t = H(v_t - threshold), and 0 while refractory                           y_t = z_t

    H is ``spike`` of the distance (v_t - threshold) / threshold: at the threshold itself there is no spike. Its
    derivative is ``surrogate`` of the distance, a triangle of height ``dampening`` where none is given.

    *What enters*, x_t W_in + z_{t-1} W_rec, is weighted by 1 - α with ``low_pass=True``, as in NEST, so that a constant
    input leads to a potential of its own size, whatever τ is. The reset is not weighted.

    *Reset*: "subtract" takes the threshold off, as above. "zero" starts anew from rest: α v_{t-1} (1 - z_{t-1}) stands
    for α v_{t-1} - threshold · z_{t-1}. "none" leaves the potential as it is. *Its gradient*: z_{t-1} is differentiated
    like any other, through the surrogate; ``detach_reset=True`` takes it as a constant, so that ∂v_t/∂v_{t-1} = α, or
    α (1 - z_{t-1}) with "zero", as in the eligibility traces of the paper (Bellec et al., 2020).

    With ``recurrent=False`` there is no W_rec, and the cell is element-wise in its carry: deep e-prop is exact for it.
    In every case z_t is a function of the rest of the carry, unit by unit, and needs no trace.

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_kernel`` (features, features); carry (v, z), each
    (features,), and with a refractory period (v, z, count), the last int32, which is the period in steps plus one at a
    spike, and falls to 0.

    *Initialisation*: kernels normal with variance 1 / fan-in; v = z = 0.

    Args:
      features: number of units.
      recurrent: with lateral weights.
      tau, dt: membrane time constant τ and length of one step; with ``refractory`` in one unit, ms by convention.
      threshold: firing threshold, in the unit of v.
      dampening: height of the triangular surrogate derivative, γ_pd in the paper.
      surrogate: another derivative of the spike: ``Triangular``, ``Exponential``, ``SuperSpike``, ``ArcTan``,
        ``Sigmoid``, ``StraightThrough``, or a function of the distance; ``dampening`` is then left alone.
      low_pass: what enters is weighted by 1 - α.
      reset: "subtract", "zero" or "none".
      detach_reset: no gradient through the reset.
      refractory: refractory period; rounded up to whole steps; 0 for none.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``tau``, ``dt`` or ``threshold`` not above 0; ``refractory`` or ``dampening``
        below 0; another ``reset``; ``dampening`` beside a ``surrogate``.
      TypeError: a ``surrogate`` that makes no array like the distance.

    >>> cell = lif(4, recurrent=False)
    >>> params, (v, z) = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> v.shape, list(params)
    ((3, 4), ['input_kernel'])
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(tau=tau, dt=dt, threshold=threshold)
    membrane = Membrane(
        math.exp(-dt / tau),
        threshold,
        low_pass,
        _reset(reset),
        detach_reset,
        _whole_steps(refractory, dt),
        chosen_surrogate(surrogate, dampening),
    )

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = _kernels(key, input_size("lif", x), features, recurrent, param_dtype)
        v = zeros_carry(x, features, param_dtype)
        return params, (v, v, *_refractory_carry(v, membrane.period))

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        v_tm1, z_tm1, *left = carry_tm1
        v_t = _potential(membrane, params, v_tm1, z_tm1, x_t)
        z_t, *left = _fire(membrane, (v_t - threshold) / threshold, left)
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
    dampening: float = DAMPENING,
    surrogate: SurrogateFunction | None = None,
    low_pass: bool = False,
    reset: str = "subtract",
    detach_reset: bool = False,
    refractory: float = 0.0,
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Adaptive leaky integrate-and-fire network: each spike raises the unit's own threshold for a while.

        α   = exp(-dt / τ)        ρ = exp(-dt / τ_a)
        a_t = ρ a_{t-1} + z_{t-1}
        v_t = α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}        W_rec without its diagonal
        z_t = H(v_t - threshold - β a_t), and 0 while refractory                           y_t = z_t

    H is ``spike`` of (v_t - threshold - β a_t) / threshold. All else is as in ``lif``; ``low_pass``, ``reset`` and
    ``detach_reset`` concern v alone, not the z_{t-1} that drives the adaptation.

    *Shapes*: params as in ``lif``; carry (v, a, z), each (features,), and with a refractory period (v, a, z, count).

    *Initialisation*: as ``lif``; a = 0.

    Args:
      features, recurrent, tau, dt, dampening, surrogate, low_pass, reset, detach_reset, refractory, param_dtype: as in
        ``lif``.
      tau_adaptation: time constant τ_a of the threshold; about the time that the task must be remembered.
      beta: rise of the threshold per spike, in the unit of v; 0 gives ``lif``.
      threshold: firing threshold at rest, in the unit of v.

    Raises:
      ValueError: as ``lif``; ``tau_adaptation`` not above 0; ``beta`` below 0.
      TypeError: as ``lif``.

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
    rho = math.exp(-dt / tau_adaptation)
    membrane = Membrane(
        math.exp(-dt / tau),
        threshold,
        low_pass,
        _reset(reset),
        detach_reset,
        _whole_steps(refractory, dt),
        chosen_surrogate(surrogate, dampening),
    )

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = _kernels(key, input_size("alif", x), features, recurrent, param_dtype)
        v = zeros_carry(x, features, param_dtype)
        return params, (v, v, v, *_refractory_carry(v, membrane.period))

    def apply(params: PyTree, carry_tm1: PyTree, x_t: jax.Array) -> tuple[PyTree, jax.Array]:
        v_tm1, a_tm1, z_tm1, *left = carry_tm1
        a_t = rho * a_tm1 + z_tm1
        v_t = _potential(membrane, params, v_tm1, z_tm1, x_t)
        z_t, *left = _fire(membrane, (v_t - threshold - beta * a_t) / threshold, left)
        return (v_t, a_t, z_t, *left), z_t

    return remade(Cell(init, apply), alif, **arguments)


def _whole_steps(refractory: float, dt: float) -> int:
    """A refractory period in whole steps; the small number keeps 3 · 0.1 / 0.1 at 3."""
    if refractory < 0:
        raise ValueError(f"refractory is a time, 0 for none; seen {refractory!r}.")
    return math.ceil(refractory / dt - 1e-9)


def _reset(name: str) -> Reset:
    try:
        return Reset(name)
    except ValueError:
        kinds = ", ".join(repr(kind.value) for kind in Reset)
        raise ValueError(f"reset is what a spike does to the potential, one of {kinds}; seen {name!r}.") from None


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


def _potential(membrane: Membrane, params: PyTree, v_tm1: jax.Array, z_tm1: jax.Array, x_t: jax.Array) -> jax.Array:
    """α v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold · z_{t-1}, or with another reset and weight of what enters."""

    def weighted(current: jax.Array) -> jax.Array:
        return (1 - membrane.alpha) * current if membrane.low_pass else current

    fired = jax.lax.stop_gradient(z_tm1) if membrane.detach_reset else z_tm1
    kept, entering = membrane.alpha * v_tm1, weighted(x_t @ params["input_kernel"])
    if membrane.reset is Reset.ZERO:
        kept = kept * (1 - fired)
    elif membrane.reset is Reset.SUBTRACT:
        entering = entering - membrane.threshold * fired
    if "recurrent_kernel" in params:
        lateral = params["recurrent_kernel"]
        # A unit has no synapse onto itself.
        others = lateral * (1 - jnp.eye(lateral.shape[0], dtype=lateral.dtype))
        entering = entering + weighted(z_tm1 @ others)
    return kept + entering


def _fire(membrane: Membrane, distance: jax.Array, left: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Spikes, and, where there is a refractory period, how long it lasts.

    The count is period + 1 at a spike and falls by one a step, to 0: at a step with a count of 1 to ``period`` the unit
    cannot fire, whatever its potential, and the surrogate derivative is 0. So the new carry tells all that decides a
    spike, its derivative included, and a spike needs no trace of its own.

    Args:
      left: the count of the step before, where there is a refractory period; else empty.
    """
    z_t = spike(distance, membrane.surrogate)
    if not left:
        return (z_t,)
    fires = (distance > 0) & (left[0] <= 1)
    refractory_t = jnp.where(fires, jnp.int32(membrane.period + 1), jnp.maximum(left[0] - 1, 0))
    resting = (refractory_t > 0) & (refractory_t <= membrane.period)
    return jnp.where(resting, jnp.zeros_like(z_t), z_t), refractory_t
