"""The zoo's stock cells: Flax Linen, Flax NNX and ``deepeprop_jax.cells``, each with its pair (F, g)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from deepeprop_jax.cells import SuperSpike, alif, elstm, indrnn, leaky_readout, leaky_rnn, lif, lru, rtu
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.network.linen import linen_cell
from deepeprop_jax.network.nnx import nnx_cell
from deepeprop_jax.reference import Pair

Apply = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class ZooCell(NamedTuple):
    """A cell of the zoo.

    Attributes:
      name: its key in ``cells()``.
      make: the cell.
      pair: its F and g.
      input_shape: of one example.
      elementwise: element-wise in its carry, so that deep e-prop is exact for it.
      distance: membrane potential above threshold, of a new carry; None for cells without spikes.
      twin: ``apply`` with the recurrence localised by hand; None where it is not typed out.
      forward_mode: whether ``jax.jvp`` can go through it; a ``custom_vjp`` cannot.
    """

    name: str
    make: Callable[[], Cell]
    pair: Pair
    input_shape: tuple[int, ...] = (2,)
    elementwise: bool = False
    distance: Callable[[PyTree], jax.Array] | None = None
    twin: Apply | None = None
    forward_mode: bool = True


def of(name: str, cell: Cell, output: Callable, **properties) -> ZooCell:
    """A cell whose F is its own apply, with g named by hand."""
    return ZooCell(name, lambda: cell, Pair(lambda p, h, x: cell.apply(p, h, x)[0], output), **properties)


def whole(params: PyTree, carry_t: PyTree, carry_tm1: PyTree, x: PyTree) -> PyTree:
    """g of a cell whose output is its carry."""
    return carry_t


def second(params: PyTree, carry_t: PyTree, carry_tm1: PyTree, x: PyTree) -> PyTree:
    """g of an LSTM, or of LIF units."""
    return carry_t[1]


def third(params: PyTree, carry_t: PyTree, carry_tm1: PyTree, x: PyTree) -> PyTree:
    """g of ALIF units."""
    return carry_t[2]


def feed_forward(name: str, cell: Cell, **properties) -> ZooCell:
    """A cell with an empty carry: y is all in g."""
    return of(name, cell, lambda p, carry_t, carry_tm1, x: cell.apply(p, (), x)[1], elementwise=True, **properties)


def local(h: jax.Array, kernel: jax.Array) -> jax.Array:
    """h @ kernel with every unit's view of the others cut: sg(h) @ offdiag(W) + h @ diag(W)."""
    diagonal = jnp.diagonal(kernel)
    return jax.lax.stop_gradient(h) @ (kernel - jnp.diag(diagonal)) + h * diagonal


class MLP(nn.Module):
    """A small feed-forward network with LayerNorm."""

    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.LayerNorm()(nn.Dense(3)(x)))
        return nn.Dense(self.features)(x)


class Squash(nn.Module):
    """A module without parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(1.5 * x)


class MixedMemoryCell(nn.RNNCellBase):
    """A user's own cell: a fast and a slow state, coupled through a learnt mixing gate; the output sums both."""

    features: int

    @nn.compact
    def __call__(self, carry, inputs):
        fast, slow = carry
        gate = nn.sigmoid(nn.Dense(self.features, name="gate")(jnp.concatenate([inputs, fast], axis=-1)))
        drive = nn.Dense(self.features, name="input")(inputs)
        fast = nn.tanh(drive + nn.Dense(self.features, use_bias=False, name="recurrent")(fast))
        slow = gate * slow + (1 - gate) * fast
        return (fast, slow), fast + slow

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        zeros = jnp.zeros((*input_shape[:-1], self.features), jnp.float32)
        return zeros, zeros

    @property
    def num_feature_axes(self):
        return 1


def simple(n: int = 3) -> ZooCell:
    def twin(params, h, x):
        p = params["params"]
        h_t = jnp.tanh(x @ p["i"]["kernel"] + p["i"]["bias"] + local(h, p["h"]["kernel"]))
        return h_t, h_t

    return of("linen_simple", linen_cell(nn.SimpleCell(n)), whole, twin=twin)


def gru(n: int = 3) -> ZooCell:
    def twin(params, h, x):
        p = params["params"]
        r = jax.nn.sigmoid(x @ p["ir"]["kernel"] + p["ir"]["bias"] + local(h, p["hr"]["kernel"]))
        z = jax.nn.sigmoid(x @ p["iz"]["kernel"] + p["iz"]["bias"] + local(h, p["hz"]["kernel"]))
        candidate = local(h, p["hn"]["kernel"]) + p["hn"]["bias"]
        n_t = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"] + r * candidate)
        h_t = (1 - z) * n_t + z * h
        return h_t, h_t

    return of("linen_gru", linen_cell(nn.GRUCell(n)), whole, twin=twin)


def _lstm_twin(params, carry, x):
    p, (c, h) = params["params"], carry

    def gate(name):
        return x @ p[f"i{name}"]["kernel"] + local(h, p[f"h{name}"]["kernel"]) + p[f"h{name}"]["bias"]

    i, f, o = (jax.nn.sigmoid(gate(name)) for name in "ifo")
    c_t = f * c + i * jnp.tanh(gate("g"))
    h_t = o * jnp.tanh(c_t)
    return (c_t, h_t), h_t


def lstm(n: int = 3) -> ZooCell:
    return of("linen_lstm", linen_cell(nn.LSTMCell(n)), second, twin=_lstm_twin)


def optimized_lstm(n: int = 3) -> ZooCell:
    return of("linen_optimized_lstm", linen_cell(nn.OptimizedLSTMCell(n)), second, twin=_lstm_twin)


def mgu(n: int = 3) -> ZooCell:
    def twin(params, h, x):
        p = params["params"]
        f = jax.nn.sigmoid(x @ p["if"]["kernel"] + p["if"]["bias"] + local(h, p["hf"]["kernel"]))
        candidate = local(h, p["hn"]["kernel"]) + p["hn"]["bias"]
        n_t = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"] + f * candidate)
        h_t = (1 - f) * n_t + f * h
        return h_t, h_t

    return of("linen_mgu", linen_cell(nn.MGUCell(n)), whole, twin=twin)


def dense(n: int = 2) -> ZooCell:
    return feed_forward("linen_dense", linen_cell(nn.Dense(n)))


def mlp(n: int = 2) -> ZooCell:
    return feed_forward("linen_mlp", linen_cell(MLP(n)))


def squash() -> ZooCell:
    return feed_forward("linen_squash", linen_cell(Squash()))


def leaky(n: int = 3) -> ZooCell:
    def twin(params, h, x):
        a = jax.nn.sigmoid(params["leak"])
        drive = x @ params["input_kernel"] + local(h, params["recurrent_kernel"]) + params["bias"]
        h_t = (1 - a) * h + a * jnp.tanh(drive)
        return h_t, h_t

    return of("leaky_rnn", leaky_rnn(n), whole, twin=twin)


def independent(n: int = 3) -> ZooCell:
    return of("indrnn", indrnn(n), whole, elementwise=True)


def linear_recurrent(n: int = 3, state_size: int = 2) -> ZooCell:
    def output(p, h_t, h_tm1, x):
        return jnp.real(jax.lax.complex(p["C_re"], p["C_im"]) @ h_t) + p["D"] @ x

    return of("lru", lru(n, state_size, r_min=0.5, r_max=0.95), output, elementwise=True)


def elementwise_lstm(n: int = 3) -> ZooCell:
    def output(p, c_t, c_tm1, x):
        gate = x @ p["output_kernel"] + c_t @ p["output_recurrent_kernel"] + p["output_bias"]
        return c_t / (1 + jnp.exp(-gate))

    return of("elstm", elstm(n), output, elementwise=True)


def trace_units(n: int = 3) -> ZooCell:
    """With a smooth activation: float32 cannot turn it on or off as it can a rectifier."""
    cell = rtu(n, activation=jnp.tanh, r_min=0.5, r_max=0.95)
    return of("rtu", cell, lambda p, h_t, h_tm1, x: jnp.concatenate(h_t), elementwise=True)


def spiking(name: str, n: int = 3, **options) -> ZooCell:
    """LIF and ALIF with time constants of a few steps, so that a short run spikes and forgets."""
    elementwise = not options.get("recurrent", True)
    if name.startswith("alif"):
        cell = alif(n, tau=5.0, tau_adaptation=20.0, beta=0.3, threshold=0.5, **options)
        return of(name, cell, third, elementwise=elementwise, distance=lambda carry: carry[0] - 0.5 - 0.3 * carry[1])
    cell = lif(n, tau=5.0, threshold=0.5, **options)
    return of(name, cell, second, elementwise=elementwise, distance=lambda carry: carry[0] - 0.5)


def readout(n: int = 2) -> ZooCell:
    return of("leaky_readout", leaky_readout(n, tau=5.0), whole, elementwise=True)


def stock() -> list[ZooCell]:
    """Every stock cell alone, on inputs of size 2."""
    conv = nn.ConvLSTMCell(features=2, kernel_size=(3,))
    user = MixedMemoryCell(3)
    # NNX's SimpleCell rounds to float32 unless its dtype is None.
    return [
        simple(),
        gru(),
        lstm(),
        optimized_lstm(),
        mgu(),
        of("linen_conv_lstm", linen_cell(conv), lambda p, carry_t, carry_tm1, x: carry_t[1], input_shape=(3, 1)),
        dense(),
        mlp(),
        squash(),
        of("linen_user", linen_cell(user), lambda p, carry_t, carry_tm1, x: carry_t[0] + carry_t[1]),
        of("nnx_simple", nnx_cell(lambda rngs: nnx.SimpleCell(2, 3, dtype=None, rngs=rngs)), whole),
        of("nnx_gru", nnx_cell(lambda rngs: nnx.GRUCell(2, 3, rngs=rngs)), whole),
        of("nnx_lstm", nnx_cell(lambda rngs: nnx.LSTMCell(2, 3, rngs=rngs)), second),
        of("nnx_optimized_lstm", nnx_cell(lambda rngs: nnx.OptimizedLSTMCell(2, 3, rngs=rngs)), second),
        feed_forward("nnx_linear", nnx_cell(lambda rngs: nnx.Linear(2, 3, rngs=rngs))),
        leaky(),
        independent(),
        linear_recurrent(),
        elementwise_lstm(),
        trace_units(),
        spiking("lif"),
        spiking("lif_no_lateral", recurrent=False),
        spiking("lif_refractory", refractory=2.0),
        spiking("lif_detached", detach_reset=True),
        spiking("lif_zero_reset", reset="zero", low_pass=True, surrogate=SuperSpike()),
        spiking("alif"),
        spiking("alif_no_lateral", recurrent=False),
        spiking("alif_refractory", refractory=2.0),
        readout(),
    ]
