"""KF-RTRL: an unbiased estimate of the influence of each weight on the carry, as one Kronecker product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.rules.by_steps import Recursion, by_steps
from deepeprop_jax.rules.flat import flat_step, number_type, square_root_of_ratio
from deepeprop_jax.rules.products import factors_of, gradient_of, structure_of
from deepeprop_jax.traces.plan import Plan


class Memory(NamedTuple):
    """Per weight u (inputs,) and A (n, outputs), whose product u ⊗ A has the influence ∂h/∂W as its mean; and the
    influence S (n, numbers) of the parameters that are no such weights, which is exact."""

    u: list[jax.Array]
    A: list[jax.Array]
    whole: jax.Array


def kf_rtrl(network: object) -> OnlineLearner:
    """Kronecker-factored real-time recurrent learning: a weight's influence is kept as one Kronecker product.

        D_t (u_{t-1} ⊗ A_{t-1}) + z_t ⊗ B_t  =  u_{t-1} ⊗ D_t A_{t-1}  +  z_t ⊗ B_t       two products; in their place

        u_t  =  c1 p1 u_{t-1}  +  c2 p2 z_t                  c1, c2 random signs, z_t the input of the weight
        A_t  =  c1 / p1 · D_t A_{t-1}  +  c2 / p2 · B_t      B_t = ∂h_t/∂a_t, a_t = z_t W

        p1 = sqrt(‖D_t A_{t-1}‖ / ‖u_{t-1}‖)        p2 = sqrt(‖B_t‖ / ‖z_t‖)

        gradient_t  =  u_{t-1} ⊗ (∂L_t/∂h_{t-1} · A_{t-1})  +  ∂L_t/∂W

    D_t = ∂h_t/∂h_{t-1} is that of the whole network, ∂L_t/∂h_{t-1} and ∂L_t/∂W go through step t alone. p is 1 where a
    norm is zero. Every weight has its own product and signs, and so has every example. The paper joins the weights of a
    layer, and its bias as one more row of them. Here biases and other vectors are kept whole, without noise: their
    influence is as large as one A.

    *Unbiased*: the mean over signs is BPTT's gradient.

    *Cost* per step and example: n backward passes through one step, and n² products per column of the weights. Memory:
    inputs + n · outputs numbers for every weight, n for every number of a vector.

    Args:
      network: as ``deep_eprop`` takes it; every matrix that reaches the carry must enter its step as one product.

    Returns:
      An ``OnlineLearner`` whose ``init(params, carry, x, key)`` takes the key of the signs; without one it is always
      ``jax.random.key(0)``, so that every sequence has the same signs. ``value_and_grad`` goes step by step.

    Raises:
      ValueError: in ``init``, a matrix that enters otherwise, with its path and what to do.

    Reference: A. Mujika, F. Meier, A. Steger, "Approximating Real-Time Recurrent Learning with Random Kronecker
    Factors" (arXiv:1805.10842).

    >>> from deepeprop_jax.cells import leaky_rnn
    >>> learner = kf_rtrl(leaky_rnn(4))
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2))
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0], jax.random.key(1)), xs, jnp.zeros(6))
    """
    return by_steps(network, _rule, kf_rtrl)


def _rule(cell: Cell) -> Recursion:
    def first(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Memory:
        structure, dtype = structure_of("kf_rtrl", cell, params, carry, x), number_type(params, carry)
        n = structure.carry.size
        u = [jnp.zeros(product.inputs, dtype) for product in structure.products]
        A = [jnp.zeros((n, product.outputs), dtype) for product in structure.products]
        return Memory(u, A, jnp.zeros((n, structure.numbers), dtype))

    def move(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree, memory: Memory, key: jax.Array) -> Memory:
        D, zs, Bs, whole = factors_of(structure_of("kf_rtrl", cell, params, carry_tm1, x), params, carry_tm1, x)
        signs = jax.random.rademacher(key, (2, len(zs)), D.dtype)
        new = Memory([], [], D @ memory.whole + whole)
        for u, A, z, B, c1, c2 in zip(memory.u, memory.A, zs, Bs, *signs, strict=True):
            p1, p2 = square_root_of_ratio(D @ A, u), square_root_of_ratio(B, z)
            new.u.append(c1 * p1 * u + c2 * p2 * z)
            new.A.append(c1 / p1 * (D @ A) + c2 / p2 * B)
        return new

    def gradient(plan: Plan, params, carry_tm1, x, memory_tm1: Memory, memory_t: Memory, dy: jax.Array) -> jax.Array:
        structure, flat = structure_of("kf_rtrl", cell, params, carry_tm1, x), flat_step(cell, params, carry_tm1, x)
        _, pull = jax.vjp(flat.output, flat.theta, flat.h_tm1)
        d_theta, d_h = pull(dy)
        factors = zip(structure.products, memory_tm1.u, memory_tm1.A, strict=True)
        products = [product.gradient(u, d_h @ A) for product, u, A in factors]
        return d_theta + gradient_of(structure, products, d_h @ memory_tm1.whole, d_theta.dtype)

    return Recursion(first, move, gradient, draws=True)
