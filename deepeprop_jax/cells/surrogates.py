"""The spike, a Heaviside step, and what stands for its derivative: surrogate derivatives, each with its source.

A surrogate is a function of the distance d = (v - A) / v_th, how far a potential v is above its threshold A, in units
of the threshold at rest. By the chain rule dz/dv = surrogate(d) / v_th. All are

    surrogate(d) = height · shape(sharpness · |d|)        shape(0) = 1

*From NEST's γ and β*, which count in the unit of v: dz/dv is ψ = γ · shape(β |v - A|), and γ / π · shape(β |v - A|) for
"arctan". So height = γ v_th and sharpness = β v_th, and height = γ v_th / π for ``ArcTan``. In NEST's first e-prop
models "piecewise_linear" is as in Bellec et al. (2020), ψ = (γ / v_th) max(0, 1 - β |v - A| / v_th): height = γ and
sharpness = β. "fast_sigmoid_derivative" is ``SuperSpike``. (Source: NEST's documentation of its e-prop neurons.)
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

SurrogateFunction: TypeAlias = Callable[[jax.Array], jax.Array]
"""Of the distance, an array, to the derivative, an array of its shape and dtype; element-wise."""

DAMPENING = 0.3
"""Height of the triangle in the experiments of Bellec et al. (2020)."""


@dataclasses.dataclass(frozen=True)
class Surrogate(abc.ABC):
    """A surrogate derivative: height · shape(sharpness · |distance|). It hashes, compares and pickles by its numbers.

    Attributes:
      height: at the threshold; 0 for no gradient through spikes.
      sharpness: how fast it falls with the distance; 0 for the same at every distance.

    Raises:
      ValueError: a height or a sharpness that is below 0 or not finite.
    """

    height: float
    sharpness: float

    def __post_init__(self) -> None:
        for name in ("height", "sharpness"):
            value = float(getattr(self, name))
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} of {type(self).__name__} is a finite number >= 0; seen {value!r}.")
            object.__setattr__(self, name, value)

    def __call__(self, distance: jax.Array) -> jax.Array:
        """The derivative at each distance."""
        return self.height * self.shape(self.sharpness * jnp.abs(distance))

    @staticmethod
    @abc.abstractmethod
    def shape(u: jax.Array) -> jax.Array:
        """The curve over u = sharpness · |distance| >= 0, which is 1 at 0."""


@dataclasses.dataclass(frozen=True)
class Triangular(Surrogate):
    """height · max(0, 1 - u), u = sharpness · |distance|.

    Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11, 3625 (2020), Methods: the pseudo-derivative; NEST's "piecewise_linear".

    >>> Triangular(height=0.5)(jnp.array([-0.5, 0.0, 2.0])).tolist()
    [0.25, 0.5, 0.0]
    """

    height: float = DAMPENING
    sharpness: float = 1.0

    @staticmethod
    def shape(u: jax.Array) -> jax.Array:
        return jnp.maximum(0, 1 - u)


@dataclasses.dataclass(frozen=True)
class Exponential(Surrogate):
    """height · exp(-u), u = sharpness · |distance|.

    Reference: S. B. Shrestha and G. Orchard, "SLAYER: Spike Layer Error Reassignment in Time", NeurIPS 2018, the
    density of a spike's change of state, ρ = exp(-β |u - ϑ|) / α; NEST's "exponential".

    >>> print(Exponential(sharpness=2.0)(jnp.array([0.0, 0.5])).round(3))
    [1.    0.368]
    """

    height: float = 1.0
    sharpness: float = 1.0

    @staticmethod
    def shape(u: jax.Array) -> jax.Array:
        return jnp.exp(-u)


@dataclasses.dataclass(frozen=True)
class SuperSpike(Surrogate):
    """height / (1 + u)², u = sharpness · |distance|: the derivative of the fast sigmoid x / (1 + |x|).

    Reference: F. Zenke and S. Ganguli, "SuperSpike: Supervised Learning in Multilayer Spiking Neural Networks", Neural
    Computation 30 (2018), the auxiliary function σ(U) of the membrane potential; its β = 1 / mV is a sharpness of 10
    where the threshold is 10 mV above rest. NEST's "fast_sigmoid_derivative".

    >>> SuperSpike()(jnp.array([-0.1, 0.0, 0.1])).tolist()
    [0.25, 1.0, 0.25]
    """

    height: float = 1.0
    sharpness: float = 10.0

    @staticmethod
    def shape(u: jax.Array) -> jax.Array:
        return 1 / jnp.square(1 + u)


@dataclasses.dataclass(frozen=True)
class ArcTan(Surrogate):
    """height / (1 + (π u)²), u = sharpness · |distance|; with both at 1 the derivative of arctan(π distance) / π.

    Reference: W. Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks", ICCV 2021, the surrogate gradient of the experiments; NEST's "arctan".

    >>> print(ArcTan()(jnp.array([0.0, 1 / jnp.pi])).round(3))
    [1.  0.5]
    """

    height: float = 1.0
    sharpness: float = 1.0

    @staticmethod
    def shape(u: jax.Array) -> jax.Array:
        return 1 / (1 + jnp.square(math.pi * u))


@dataclasses.dataclass(frozen=True)
class Sigmoid(Surrogate):
    """height · 4 σ(u) σ(-u), u = sharpness · |distance|; at sharpness = 4 height the derivative of σ(sharpness · d).

    Reference: E. O. Neftci, H. Mostafa and F. Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", IEEE
    Signal Processing Magazine 36 (2019), the derivative of a sigmoid.

    >>> print(Sigmoid()(jnp.array([0.0, 0.5])).round(2))
    [1.   0.42]
    """

    height: float = 1.0
    sharpness: float = 4.0

    @staticmethod
    def shape(u: jax.Array) -> jax.Array:
        return 4 * jax.nn.sigmoid(u) * jax.nn.sigmoid(-u)


@dataclasses.dataclass(frozen=True)
class StraightThrough(Surrogate):
    """height where u <= 1, else 0, u = sharpness · |distance|; by default ``height`` everywhere.

    Reference: Y. Bengio, N. Léonard and A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons
    for Conditional Computation", arXiv:1308.3432 (2013), the straight-through estimator; with ``sharpness=1`` the one
    that is 0 where |distance| > 1: I. Hubara et al., "Binarized Neural Networks", NeurIPS 2016.

    >>> [StraightThrough(sharpness=sharpness)(jnp.array([0.5, 3.0])).tolist() for sharpness in (0.0, 1.0)]
    [[1.0, 1.0], [1.0, 0.0]]
    """

    height: float = 1.0
    sharpness: float = 0.0

    @staticmethod
    def shape(u: jax.Array) -> jax.Array:
        return (u <= 1).astype(u.dtype)


def spike(distance: jax.Array, surrogate: SurrogateFunction) -> jax.Array:
    """Heaviside step with a surrogate derivative, for both modes of differentiation.

        z = 1 where distance > 0, else 0        dz/d(distance) := surrogate(distance)

    At the threshold itself there is no spike, where NEST's units (v >= v_th) make one. It matters where potentials are
    round numbers, such as sums of equal weights without a leak; not where they are real numbers.

    Args:
      distance: membrane potential above threshold, in units of the base threshold: (v - A) / v_th.
      surrogate: one of this file's, or a function of the distance, element-wise.

    Returns:
      The spikes, in the dtype of ``distance``.

    >>> jax.vmap(jax.grad(lambda distance: spike(distance, SuperSpike())))(jnp.array([-0.1, 0.0, 0.1])).tolist()
    [0.25, 1.0, 0.25]
    """
    return _spike(distance, surrogate)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _spike(distance: jax.Array, surrogate: SurrogateFunction) -> jax.Array:
    return (distance > 0).astype(distance.dtype)


@_spike.defjvp
def _spike_jvp(
    surrogate: SurrogateFunction, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (distance,), (tangent,) = primals, tangents
    return _spike(distance, surrogate), surrogate(distance) * tangent


def triangular_spike(distance: jax.Array, dampening: float = DAMPENING) -> jax.Array:
    """``spike`` with the triangular surrogate derivative of Bellec et al. (2020).

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
    return spike(distance, Triangular(dampening))


def chosen_surrogate(surrogate: SurrogateFunction | None, dampening: float) -> SurrogateFunction:
    """What a cell differentiates its spikes by: the triangle where nothing is given.

    Raises:
      TypeError: not a function of an array that gives one of its shape and dtype.
      ValueError: a ``dampening`` beside a surrogate.
    """
    if surrogate is None:
        return Triangular(dampening)
    if dampening != DAMPENING:
        raise ValueError(
            f"dampening is the height of the triangle that stands where surrogate is None; seen dampening="
            f"{dampening!r} beside surrogate={surrogate!r}. Give the surrogate its height: Triangular({dampening!r})."
        )
    needed = "needed a function of the distance (v - A) / v_th, an array, to the derivative, an array of its shape"
    if isinstance(surrogate, type):
        raise TypeError(f"surrogate: {needed}; seen the class {surrogate.__name__}. Give one: {surrogate.__name__}().")
    if not callable(surrogate):
        raise TypeError(f"surrogate: {needed}; seen {surrogate!r}. Give one of deepeprop_jax.cells, as SuperSpike().")
    distance = jax.ShapeDtypeStruct((3,), jnp.float32)
    slope = jax.eval_shape(surrogate, distance)
    if (getattr(slope, "shape", None), getattr(slope, "dtype", None)) != (distance.shape, distance.dtype):
        raise TypeError(f"surrogate: {needed} and dtype; {surrogate!r} made {slope!r} of {distance!r}.")
    return surrogate
