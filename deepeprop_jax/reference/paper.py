"""The paper's recursion through depth and time, typed literally: every partial derivative a full matrix.

For small networks: it is written to be read beside the paper and to be compared with, not to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepeprop_jax.network.cell import Cell, PyTree, Wire, connect, graph_of, parents
from deepeprop_jax.reference.backpropagation import LossFn, Pair, as_gradient, real_leaves, with_real_leaves
from deepeprop_jax.reference.stop_gradient import Layer, part_of, unfold, whole_of

Sensitivities = dict[tuple[str, str], jax.Array]


class Recursion(NamedTuple):
    """What the recursion gives over a whole sequence.

    A node's name is that in ``graph_of(network)``, with ``[l]`` appended for layer l of a deep node. Real coordinates
    run over the differentiable leaves in pytree order, a complex leaf as its real and then its imaginary part.

    Attributes:
      loss: summed over the steps.
      carry: the final carry.
      grads: the final contraction; pytree, shapes and dtypes of params.
      carry_sensitivity: S, ``{(v, k): (T, batch, n_v, |θ^k|)}`` for every node v reachable from the source k.
      output_sensitivity: Y, ``{(v, k): (T, batch, |y^v|, |θ^k|)}``.
    """

    loss: jax.Array
    carry: PyTree
    grads: PyTree
    carry_sensitivity: Sensitivities
    output_sensitivity: Sensitivities


def to_real(tree: PyTree) -> jax.Array:
    """The differentiable leaves of a pytree as one real vector."""
    leaves = real_leaves(tree)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]) if leaves else jnp.zeros(0)


def _split(vector: jax.Array, like: PyTree) -> list[jax.Array]:
    leaves = real_leaves(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = zip(leaves, jnp.split(vector, ends[:-1]), strict=True) if leaves else ()
    return [part.reshape(leaf.shape).astype(leaf.dtype) for leaf, part in parts]


def from_real(vector: jax.Array, like: PyTree) -> PyTree:
    """The inverse of ``to_real``; leaves that are not differentiable come from ``like``."""
    return with_real_leaves(like, _split(vector, like))


def unit_mask(carry: PyTree) -> np.ndarray:
    """(n, n) bool: whether two real coordinates of a carry belong to the same unit (shape and index equal)."""
    units = [(leaf.shape, index) for leaf in real_leaves(carry) for index in range(leaf.size)]
    return np.array([[a == b for b in units] for a in units], dtype=bool).reshape(len(units), len(units))


class _Partials(NamedTuple):
    """The matrices of one node at one step of one example; rows are new coordinates, columns old ones."""

    F_theta: jax.Array
    F_h: jax.Array
    F_u: jax.Array
    g_theta: jax.Array
    g_h_t: jax.Array
    g_h_tm1: jax.Array
    g_u: jax.Array


def _partials(pair: Pair, theta: PyTree, h_tm1: PyTree, h_t: PyTree, u: PyTree, localise: bool) -> _Partials:
    def F(theta_: jax.Array, h_tm1_: jax.Array, u_: jax.Array) -> jax.Array:
        return to_real(pair.carry(from_real(theta_, theta), from_real(h_tm1_, h_tm1), from_real(u_, u)))

    def g(theta_: jax.Array, h_t_: jax.Array, h_tm1_: jax.Array, u_: jax.Array) -> jax.Array:
        return to_real(
            pair.output(from_real(theta_, theta), from_real(h_t_, h_t), from_real(h_tm1_, h_tm1), from_real(u_, u))
        )

    at = [to_real(tree) for tree in (theta, h_tm1, u)]
    F_theta, F_h, F_u = jax.jacfwd(F, argnums=(0, 1, 2))(*at)
    if localise:
        F_h = jnp.where(unit_mask(h_tm1), F_h, 0)
    return _Partials(F_theta, F_h, F_u, *jax.jacfwd(g, argnums=(0, 1, 2, 3))(at[0], to_real(h_t), *at[1:]))


def _wiring(wire: Wire, x: PyTree, outputs: dict[int, PyTree], parent: int) -> jax.Array:
    """∂u/∂y^p: where an output of the parent stands in the node's input."""

    def place(y: jax.Array) -> jax.Array:
        return to_real(connect(wire, x, {**outputs, parent: from_real(y, outputs[parent])}))

    return jax.jacfwd(place)(to_real(outputs[parent]))


def paper_recursion(network: Cell, pairs: Sequence[Pair], *, localise: bool = False) -> Callable[..., Recursion]:
    """Sensitivities of every node to the parameters of every node below it, carried forward in time and up in depth.

        S^{v,k}_t = ∂F/∂h S^{v,k}_{t-1} + ∂F/∂u U^{v,k}_t + [v = k] ∂F/∂θ
        Y^{v,k}_t = ∂g/∂h_t S^{v,k}_t + ∂g/∂h_{t-1} S^{v,k}_{t-1} + ∂g/∂u U^{v,k}_t + [v = k] ∂g/∂θ
        U^{v,k}_t = Σ_p ∂u^v_t/∂y^p_t Y^{p,k}_t                              over the parents p of v
        dL/dθ^k   = Σ_t Σ_v ∂L_t/∂y^v_t Y^{v,k}_t                            over the nodes v that the loss reads

    Millidge (arXiv:2512.24506), eq. 7 to 11. The first two terms of S are eq. 9's moves on the lattice, right (time)
    and up (depth). Of eq. 10's cases, the terminal node is v = k, which has the direct ∂F/∂θ; a nonterminal node has a
    trace below it, here multiplied by ∂h^l_t/∂h^{l-1}_t where print has a misprint. Eq. 11 is the sum over the parents.
    S_0 = 0: the initial carry is a constant. Every partial derivative is a ``jax.jacfwd`` matrix.

    *Exact when* ``localise`` is False: it then equals BPTT. With ``localise`` each ∂F/∂h keeps its unit-local blocks
    alone (eq. 6, carried through depth), and it equals ``stop_gradient_oracle``.

    *Cost*: memory O(T · batch · Σ n_v |θ^k|), as every step's sensitivities are returned. A cell with a
    ``jax.custom_vjp`` has no forward mode.

    Returns:
      ``run(params, carry, xs, targets, loss_fn) -> Recursion``; shapes as for ``bptt``, ``pairs`` as for
      ``stop_gradient_oracle``.
    """
    graph = graph_of(network)
    layers, output = unfold(network, pairs)
    sources = _sources(layers)
    loss_nodes = parents(output)

    def example_step(params: PyTree, carry_tm1: PyTree, S_tm1: dict, x: PyTree) -> tuple[PyTree, dict, dict, dict]:
        carries: list[PyTree] = []
        y: dict[int, PyTree] = {}
        S: dict[tuple[int, int], jax.Array] = {}
        Y: dict[tuple[int, int], jax.Array] = {}
        for v, layer in enumerate(layers):
            theta, h_tm1 = part_of(params, graph, layer), part_of(carry_tm1, graph, layer)
            u = connect(layer.wire, x, y)
            h_t = layer.pair.carry(theta, h_tm1, u)
            d = _partials(layer.pair, theta, h_tm1, h_t, u, localise)
            wiring = {p: _wiring(layer.wire, x, y, p) for p in parents(layer.wire)}
            for k in sources[v]:
                if k == v:  # terminal: nothing below v depends on its own parameters
                    S[v, k] = d.F_h @ S_tm1[v, k] + d.F_theta
                    Y[v, k] = d.g_h_t @ S[v, k] + d.g_h_tm1 @ S_tm1[v, k] + d.g_theta
                else:
                    U = sum(wiring[p] @ Y[p, k] for p in wiring if k in sources[p])
                    S[v, k] = d.F_h @ S_tm1[v, k] + d.F_u @ U
                    Y[v, k] = d.g_h_t @ S[v, k] + d.g_h_tm1 @ S_tm1[v, k] + d.g_u @ U
            carries.append(h_t)
            y[v] = layer.pair.output(theta, h_t, h_tm1, u)
        return whole_of(graph, layers, carries, like=carry_tm1), y, S, Y

    def run(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, loss_fn: LossFn) -> Recursion:
        thetas = [part_of(params, graph, layer) for layer in layers]

        def initial_S(example_carry: PyTree) -> dict:
            h_0 = [to_real(part_of(example_carry, graph, layer)) for layer in layers]
            return {
                (v, k): jnp.zeros((h_0[v].size, to_real(thetas[k]).size), jnp.result_type(h_0[v], to_real(thetas[k])))
                for v in range(len(layers))
                for k in sources[v]
            }

        def step(memory: tuple[PyTree, dict], at: tuple[PyTree, PyTree]) -> tuple:
            x, target = at
            carry_t, y, S, Y = jax.vmap(example_step, in_axes=(None, 0, 0, 0))(params, *memory, x)

            def loss_of(reals: dict[int, jax.Array]) -> jax.Array:
                read = {v: jax.vmap(from_real)(reals[v], y[v]) for v in loss_nodes}
                return loss_fn(jax.vmap(lambda x, read: connect(output, x, read))(x, read), target)

            loss, dL_dy = jax.value_and_grad(loss_of)({v: jax.vmap(to_real)(y[v]) for v in loss_nodes})
            return (carry_t, S), (loss, dL_dy, S, Y)

        (final_carry, _), (losses, dL_dy, S, Y) = lax.scan(step, (carry, jax.vmap(initial_S)(carry)), (xs, targets))

        grads = []
        for k, theta in enumerate(thetas):
            total = sum(
                (jnp.einsum("tbi,tbip->p", dL_dy[v], Y[v, k]) for v in loss_nodes if k in sources[v]),
                jnp.zeros_like(to_real(theta)),
            )
            grads.append(as_gradient(_split(total, theta), theta))
        named = [{(layers[v].name, layers[k].name): value for (v, k), value in traces.items()} for traces in (S, Y)]
        return Recursion(losses.sum(), final_carry, whole_of(graph, layers, grads, like=params), *named)

    return run


def _sources(layers: Sequence[Layer]) -> list[list[int]]:
    """Per node: the nodes whose parameters its output depends on within the step, itself last."""
    sources: list[list[int]] = []
    for v, layer in enumerate(layers):
        below = {k for p in parents(layer.wire) for k in sources[p]}
        sources.append([*sorted(below), v])
    return sources
