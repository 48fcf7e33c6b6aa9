"""The spike and its surrogate derivative."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def triangular_spike(distance: jax.Array, dampening: float = 0.3) -> jax.Array:
    """Heaviside step with a triangular surrogate derivative, for both modes of differentiation.

    z = 1 where distance > 0, else 0        dz/d(distance) := dampening · max(0, 1 - |distance|)

    Args:
      distance: membrane potential above threshold, in units of the base threshold: (v - A) / v_th.
      dampening: height of the surrogate, γ_pd in the paper.

    Returns:
      The spikes, in the dtype of ``distance``.

    Reference: G. Bellec et al., Nature Communications 11, 3625 (2020), Methods: pseudo-derivative
    ψ = (γ_pd / v_th) max(0, 1 - |(v - A) / v_th|).

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


def fire(distance: jax.Array, refractory_tm1: jax.Array | None, period: int, dampening: float) -> tuple[jax.Array, ...]:
    """Spikes, and, where there is a refractory period, how long it lasts.

    The count is period + 1 at a spike and falls by one a step, to 0: at a step with a count of 1 to ``period`` the unit
    cannot fire, whatever its potential, and the surrogate derivative is 0. So the new carry tells all that decides a
    spike, its derivative included, and a spike needs no trace of its own.

    Returns:
      ``(z_t,)`` where ``refractory_tm1`` is None, else ``(z_t, refractory_t)``.
    """
    z_t = triangular_spike(distance, dampening)
    if refractory_tm1 is None:
        return (z_t,)
    fires = (distance > 0) & (refractory_tm1 <= 1)
    refractory_t = jnp.where(fires, jnp.int32(period + 1), jnp.maximum(refractory_tm1 - 1, 0))
    resting = (refractory_t > 0) & (refractory_t <= period)
    return jnp.where(resting, jnp.zeros_like(z_t), z_t), refractory_t


def without_self(recurrent_kernel: jax.Array) -> jax.Array:
    """Lateral weights: a unit has no synapse onto itself."""
    return recurrent_kernel * (1 - jnp.eye(recurrent_kernel.shape[0], dtype=recurrent_kernel.dtype))
