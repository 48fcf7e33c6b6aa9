"""memorax's ``RTRL`` around its RTU and LRU layers, and the same cells here.

``RTRL`` carries S = ∂h/∂θ of its own layer beside the carry, and puts S · (θ − stop_gradient(θ)) on it, which is 0 and
has the derivative S: so ``jax.grad`` of a loss on a piece of a sequence has the credit of all steps before. The release
1.0.1 has no ``RTRL``; its repository has, under the same version number (seen at commit 0f33712 of memory-rl/memorax).
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepeprop_jax import Cell, stack
from deepeprop_jax.cells import lru, rtu
from experiments.peers.network import Gradient, Sizes, Theirs, linear, loss_fn

CELLS = ("RTU", "LRU")
NAMES = {
    "RTU": {"nu_log": "nu_log", "theta_log": "theta_log", "input_kernel_1": "B_real", "input_kernel_2": "B_imag"},
    "LRU": {name: name for name in ("nu_log", "theta_log", "gamma_log", "D")}
    | {
        f"{matrix}_{ours}": f"{matrix}_{theirs}" for matrix in "BC" for ours, theirs in (("re", "real"), ("im", "imag"))
    },
}
"""What a parameter here is called there; an RTU's matrices are transposed as well."""


def missing() -> str | None:
    """Why it cannot run here; None where it can."""
    if importlib.util.find_spec("memorax") is None:
        return "memorax is not installed"
    import memorax.networks

    return None if hasattr(memorax.networks, "RTRL") else "this memorax has no RTRL"


def diagonal_lru(features: int) -> Cell:
    """``lru`` with as many outputs as units and inputs, whose D is a vector, as memorax has it."""
    whole = lru(features, features)

    def init(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        params, carry = whole.init(key, x)
        return params | {"D": jax.random.normal(key, (features,))}, carry

    def apply(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        return whole.apply(params | {"D": jnp.diag(params["D"])}, carry, x)

    return Cell(init, apply)


SAME = {"RTU": rtu, "LRU": diagonal_lru}


def renamed(cell: str, params: dict[str, jax.Array]) -> dict[str, Any]:
    """A layer's parameters here as those of a layer of theirs."""
    leaves = {
        NAMES[cell][name]: value.T if name.startswith("input_kernel") else value for name, value in params.items()
    }
    return {"params": {"sequence_model": {"cell": leaves}}}


def modules(cell: str, units: int, inputs: list[int]) -> list[Any]:
    """Their layers, each within ``RTRL``, from the number of inputs of each."""
    from memorax.networks import RNN, RTRL, LRUCell, Memoroid, RTUCell

    if cell == "RTU":
        return [RTRL(RNN(cell=RTUCell(features=n, hidden_dim=units))) for n in inputs]
    return [RTRL(Memoroid(cell=LRUCell(features=n, hidden_dim=units))) for n in inputs]


def start(layers: list[Any], batch: int, inputs: list[int]) -> tuple:
    """Carry and sensitivities of every layer."""
    return tuple(layer.initialize_carry(jax.random.key(0), (batch, n)) for layer, n in zip(layers, inputs, strict=True))


def forward(cell: str, layers: list[Any], params: Any, carries: tuple, xs: jax.Array) -> tuple[tuple, jax.Array]:
    """A piece of a sequence, xs (steps, batch, inputs), and the carries after it."""
    x, done, found = xs.swapaxes(0, 1), jnp.zeros((xs.shape[1], xs.shape[0])), []
    for layer, own, carry in zip(layers, params, carries, strict=True):
        carry, x = layer.apply(renamed(cell, own), x, done, carry)
        found.append(carry)
    return tuple(found), x.swapaxes(0, 1)


def by_pieces(loss: Any, params: Any, carries: Any, xs: jax.Array, targets: jax.Array, length: int) -> tuple:
    """(loss, grads, end): ``jax.grad`` of ``loss(params, carries, xs, targets)`` of each piece of ``length`` steps.

    ``loss`` returns the summed loss of a piece and the carries after it.
    """
    pieces = jax.tree.map(lambda leaf: leaf.reshape(-1, length, *leaf.shape[1:]), (xs, targets))

    def body(loop: tuple, piece: tuple) -> tuple[tuple, None]:
        carries, total, sums = loop
        (value, carries), grads = jax.value_and_grad(loss, has_aux=True)(params, carries, *piece)
        return (carries, total + value, jax.tree.map(jnp.add, sums, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (end, total, grads), _ = jax.lax.scan(body, (carries, jnp.zeros(()), zeros), pieces)
    return total, grads, end


def network(cell: str, sizes: Sizes, seed: int) -> Theirs:
    """Two layers of one of ``CELLS`` and a readout, with the initial weights of this library's cell."""
    cells = (SAME[cell](sizes.units), SAME[cell](sizes.units), Cell(partial(_init_readout, sizes.outputs), _readout))
    params, _ = stack(*cells).init(jax.random.key(seed), jnp.zeros((sizes.batch, sizes.units)))
    inputs = [sizes.units, sizes.units * (2 if cell == "RTU" else 1)]
    layers = modules(cell, sizes.units, inputs)

    def loss(layers: list[Any], params: Any, carries: tuple, xs: jax.Array, targets: jax.Array) -> tuple:
        *recurrent, readout = params
        carries, y = forward(cell, layers, recurrent, carries, xs)
        return jnp.sum(jax.vmap(loss_fn)(linear(readout, y), targets)), carries

    def bptt(xs: jax.Array, targets: jax.Array) -> tuple:
        plain = [_Plain(layer.sequence_model) for layer in layers]
        carries = tuple(carry for carry, _ in start(layers, sizes.batch, inputs))
        return jax.grad(partial(loss, plain), has_aux=True)(params, carries, xs, targets)[0]

    def rtrl(length: int, xs: jax.Array, targets: jax.Array) -> tuple:
        return by_pieces(partial(loss, layers), params, start(layers, sizes.batch, inputs), xs, targets, length)[1]

    rules: dict[str, Gradient] = {
        "RTRL": jax.jit(partial(rtrl, 1)),
        "RTRL, windows of 5": jax.jit(partial(rtrl, 5)),
    }
    return Theirs(params, jax.jit(bptt), rules, cells)


class _Plain:
    """A layer of theirs outside of ``RTRL``, which takes the same parameters."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def apply(self, params: Any, x: jax.Array, done: jax.Array, carry: Any) -> tuple:
        return self.layer.apply({"params": params["params"]["sequence_model"]}, x, done, carry)


def _init_readout(outputs: int, key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    weight = jax.nn.initializers.lecun_normal()(key, (x.shape[-1], outputs))
    return {"weight": weight, "bias": jnp.zeros(outputs)}, ()


def _readout(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    return carry, linear(params, x)
