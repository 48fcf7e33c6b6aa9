"""Units of real numbers: leaky tanh network, independently recurrent network, leaky readout, low-pass filter."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepeprop_jax.cells.arguments import changed, check_positive, check_size, input_size, zeros_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade


def leaky_rnn(
    features: int, *, time_constants: tuple[float, float] = (1.0, 10.0), param_dtype: DTypeLike = jnp.float32
) -> Cell:
    """Leaky tanh RNN: every unit is a low-pass filter with its own learnable time constant.

        a   = sigmoid(leak)
        h_t = (1 - a) ∘ h_{t-1} + a ∘ tanh(x_t W_in + h_{t-1} W_rec + b)        y_t = h_t

    Left alone, a unit decays as (1 - a)^t = exp(-t / τ), with τ in steps: leak = log(exp(1 / τ) - 1).

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_kernel`` (features, features), ``bias`` and
    ``leak`` (features,); carry h (features,).

    *Initialisation*: ``input_kernel`` LeCun normal, ``recurrent_kernel`` orthogonal, ``bias`` 0; τ log-uniform between
    the two ``time_constants``; h = 0.

    Args:
      features: number of units.
      time_constants: smallest and largest initial τ, in steps.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``time_constants`` not positive or not in order.

    Reference: H. Jaeger et al., "Optimization and applications of echo state networks with leaky-integrator neurons",
    Neural Networks 20 (2007); here with one learnable leaking rate per unit.

    >>> cell = leaky_rnn(4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape, params["leak"].shape
    ((3, 4), (4,))
    """
    arguments = dict(locals())
    check_size("features", features)
    shortest, longest = time_constants
    check_positive(shortest_time_constant=shortest)
    if longest < shortest:
        raise ValueError(f"time_constants are (smallest, largest) in steps; seen {time_constants!r}.")

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        input_key, recurrent_key, leak_key = jax.random.split(key, 3)
        shape = (input_size("leaky_rnn", x), features)
        exponent = jax.random.uniform(leak_key, (features,), param_dtype)
        tau = shortest * (longest / shortest) ** exponent
        params = {
            "input_kernel": jax.nn.initializers.lecun_normal()(input_key, shape, param_dtype),
            "recurrent_kernel": jax.nn.initializers.orthogonal()(recurrent_key, (features, features), param_dtype),
            "bias": jnp.zeros((features,), param_dtype),
            "leak": jnp.log(jnp.expm1(1 / tau)),
        }
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jax.nn.sigmoid(params["leak"])
        drive = x_t @ params["input_kernel"] + h_tm1 @ params["recurrent_kernel"] + params["bias"]
        h_t = (1 - a) * h_tm1 + a * jnp.tanh(drive)
        return h_t, h_t

    return remade(Cell(init, apply), leaky_rnn, **arguments)


def indrnn(
    features: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    recurrent_max: float = 1.0,
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """IndRNN: element-wise in its carry, so deep e-prop is exact for it.

        h_t = activation(x_t W_in + u ∘ h_{t-1} + b)        y_t = h_t

    *Shapes*: params ``input_kernel`` (inputs, features), ``recurrent_weight`` u and ``bias`` (features,); carry h
    (features,).

    *Initialisation*: ``input_kernel`` LeCun normal; u uniform in [0, ``recurrent_max``]; ``bias`` 0; h = 0. With the
    rectifier the gradient over T steps scales with u^T, so that ``recurrent_max`` = 2^(1/T) keeps it below 2.

    Args:
      features: number of units.
      activation: element-wise function; the rectifier in the paper.
      recurrent_max: largest initial recurrent weight.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1, or ``recurrent_max`` not above 0.

    Reference: S. Li et al., "Independently Recurrent Neural Network (IndRNN)", CVPR 2018, eq. 2.

    >>> cell = indrnn(4)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape, params["recurrent_weight"].shape
    ((3, 4), (4,))
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(recurrent_max=recurrent_max)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        input_key, recurrent_key = jax.random.split(key)
        shape = (input_size("indrnn", x), features)
        params = {
            "input_kernel": jax.nn.initializers.lecun_normal()(input_key, shape, param_dtype),
            "recurrent_weight": jax.random.uniform(recurrent_key, (features,), param_dtype, maxval=recurrent_max),
            "bias": jnp.zeros((features,), param_dtype),
        }
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, h_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h_t = activation(x_t @ params["input_kernel"] + params["recurrent_weight"] * h_tm1 + params["bias"])
        return h_t, h_t

    return remade(Cell(init, apply), indrnn, **changed(indrnn, arguments))


def leaky_readout(
    features: int,
    *,
    tau: float = 20.0,
    dt: float = 1.0,
    use_bias: bool = True,
    low_pass: bool = False,
    param_dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Leaky linear integrator: the readout of spiking networks, which smooths their spikes.

        κ   = exp(-dt / τ)
        y_t = κ y_{t-1} + x_t W + b

    What enters, x_t W + b, is weighted by 1 - κ with ``low_pass=True``, so that a constant input leads to an output of
    its own size, whatever τ is: y_t = κ y_{t-1} + (1 - κ) (x_t W + b), as in NEST, without b there.

    It has a carry, so it counts as a recurrent node: with ``hops=0`` the layers below do not see what they did to it at
    earlier steps. It is element-wise in its carry, so deep e-prop is exact for it.

    *Shapes*: params ``kernel`` (inputs, features), with ``use_bias`` also ``bias`` (features,); carry y (features,).

    *Initialisation*: ``kernel`` LeCun normal, ``bias`` 0, y = 0.

    Args:
      features: number of outputs.
      tau, dt: time constant τ of the readout and length of one step, in the same unit, ms by convention.
      use_bias: with b.
      low_pass: what enters is weighted by 1 - κ.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: ``features`` below 1; ``tau`` or ``dt`` not above 0.

    Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 11, 3625 (2020), Methods: network models, the output y_k^t.

    >>> cell = leaky_readout(2)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape
    (3, 2)
    """
    arguments = dict(locals())
    check_size("features", features)
    check_positive(tau=tau, dt=dt)
    kappa = math.exp(-dt / tau)

    def weighted(current: jax.Array) -> jax.Array:
        return (1 - kappa) * current if low_pass else current

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        shape = (input_size("leaky_readout", x), features)
        params = {"kernel": jax.nn.initializers.lecun_normal()(key, shape, param_dtype)}
        if use_bias:
            params["bias"] = jnp.zeros((features,), param_dtype)
        return params, zeros_carry(x, features, param_dtype)

    def apply(params: PyTree, y_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_t = kappa * y_tm1 + weighted(x_t @ params["kernel"])
        if use_bias:
            y_t = y_t + weighted(params["bias"])
        return y_t, y_t

    return remade(Cell(init, apply), leaky_readout, **arguments)


def low_pass(*, tau: float = 20.0, dt: float = 1.0) -> Cell:
    """Low-pass filter of what enters: a running mean, such as a firing rate. No parameters.

        κ   = exp(-dt / τ)
        y_t = κ y_{t-1} + (1 - κ) x_t

    Behind a layer of spiking units y is the layer's rate, in spikes per step, over the last τ; a loss on it is a loss
    on the rate. With a ``Dense`` layer behind it, it is a ``leaky_readout`` whose filter comes first.

    *Shapes*: params ``{}``; carry y and output, as the input, any shape.

    Args:
      tau, dt: time constant τ and length of one step, in the same unit, ms by convention.

    Raises:
      ValueError: ``tau`` or ``dt`` not above 0.

    >>> cell = low_pass(tau=10.0)
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry.shape
    (3, 5)
    """
    arguments = dict(locals())
    check_positive(tau=tau, dt=dt)
    kappa = math.exp(-dt / tau)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        return {}, jnp.zeros_like(x)

    def apply(params: PyTree, y_tm1: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_t = kappa * y_tm1 + (1 - kappa) * x_t
        return y_t, y_t

    return remade(Cell(init, apply), low_pass, **arguments)
