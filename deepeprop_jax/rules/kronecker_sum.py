"""OK: the optimal Kronecker-sum approximation of real-time recurrent learning."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepeprop_jax.learner.checks import check_count
from deepeprop_jax.learner.contract import OnlineLearner
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.rules.by_steps import Recursion, by_steps
from deepeprop_jax.rules.flat import flat_step, number_type
from deepeprop_jax.rules.products import factors_of, gradient_of, structure_of
from deepeprop_jax.rules.small_matrices import small_svd, thin_qr
from deepeprop_jax.traces.plan import Plan


class Memory(NamedTuple):
    """Per weight U (r, inputs) and A (r, n, outputs), whose Σ U_i ⊗ A_i has the influence ∂h/∂W as its mean; and the
    influence S (n, numbers) of the parameters that are no such weights, which is exact."""

    U: list[jax.Array]
    A: list[jax.Array]
    whole: jax.Array


def kronecker_sum(network: object, rank: int = 4) -> OnlineLearner:
    """OK: a weight's influence is kept as a sum of r Kronecker products, made of r + 1 with the least variance.

        Σ_i U_i ⊗ D_t A_i  +  z_t ⊗ B_t                      r + 1 products, i = 1 ... r
        U = Q_U R_U,  A = Q_A R_A                            of these, a column each
        R_U R_Aᵀ = L diag(d) Rᵀ                              an SVD of r + 1 numbers
        U_t = Q_U L X,  A_t = Q_A R X                        X (r + 1, r) random, E X Xᵀ = diag(d): ``least_variance``

        gradient_t  =  Σ_i U_i ⊗ (∂L_t/∂h_{t-1} · A_i)  +  ∂L_t/∂W          U, A of t − 1

    z_t, B_t and D_t are those of ``kf_rtrl``, which is the like with one product and another choice of it; what is no
    weight is kept whole, as there.

    *Unbiased*: the mean over signs is BPTT's gradient. Exact while no more than r products are there: r steps.

    *Cost* per step and example: n backward passes through one step, n² products per column of the weights and summand,
    a QR of (n · outputs, r + 1) and an SVD per weight; r (inputs + n · outputs) numbers for every weight.

    Args:
      network: as ``deep_eprop`` takes it; every matrix that reaches the carry must enter its step as one product.
      rank: r, at least 1.

    Returns:
      An ``OnlineLearner`` whose ``init(params, carry, x, key)`` takes the key of the signs; without one it is always
      ``jax.random.key(0)``, so that every sequence has the same signs. ``value_and_grad`` goes step by step.

    Raises:
      TypeError, ValueError: a rank that is no integer, or below 1; in ``init``, a matrix that enters otherwise, with
        its path and what to do.

    Reference: F. Benzing, M. M. Gauy, A. Mujika, A. Martinsson, A. Steger, "Optimal Kronecker-Sum Approximation of Real
    Time Recurrent Learning" (arXiv:1902.03993).

    >>> from deepeprop_jax.cells import leaky_rnn
    >>> learner = kronecker_sum(leaky_rnn(4), rank=2)
    >>> xs = jnp.ones((6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = learner.value_and_grad(lambda y, target: jnp.mean((y - target) ** 2))
    >>> (loss, state), grads = run(params, learner.init(params, carry, xs[0], jax.random.key(1)), xs, jnp.zeros(6))
    """
    check_count("rank", rank, 1, "an integer >= 1, the Kronecker products that a weight's influence is a sum of")
    return by_steps(network, lambda cell: _rule(cell, rank), kronecker_sum, rank=rank)


def _rule(cell: Cell, r: int) -> Recursion:
    def first(plan: Plan, params: PyTree, carry: PyTree, x: PyTree) -> Memory:
        structure, dtype = structure_of("kronecker_sum", cell, params, carry, x), number_type(params, carry)
        n = structure.carry.size
        U = [jnp.zeros((r, product.inputs), dtype) for product in structure.products]
        A = [jnp.zeros((r, n, product.outputs), dtype) for product in structure.products]
        return Memory(U, A, jnp.zeros((n, structure.numbers), dtype))

    def move(plan: Plan, params: PyTree, carry_tm1: PyTree, x: PyTree, memory: Memory, key: jax.Array) -> Memory:
        D, zs, Bs, whole = factors_of(structure_of("kronecker_sum", cell, params, carry_tm1, x), params, carry_tm1, x)
        new = Memory([], [], D @ memory.whole + whole)
        keys = jax.random.split(key, len(zs))
        for U, A, z, B, own in zip(memory.U, memory.A, zs, Bs, keys, strict=True):
            products = jnp.concatenate([D @ A, B[None]])
            U_t, A_t = _one_less(jnp.concatenate([U, z[None]]).T, products.reshape(r + 1, -1).T, own)
            new.U.append(U_t.T)
            new.A.append(A_t.T.reshape(A.shape))
        return new

    def gradient(plan: Plan, params, carry_tm1, x, memory_tm1: Memory, memory_t: Memory, dy: jax.Array) -> jax.Array:
        structure = structure_of("kronecker_sum", cell, params, carry_tm1, x)
        flat = flat_step(cell, params, carry_tm1, x)
        _, pull = jax.vjp(flat.output, flat.theta, flat.h_tm1)
        d_theta, d_h = pull(dy)
        factors = zip(structure.products, memory_tm1.U, memory_tm1.A, strict=True)
        products = [jax.vmap(product.gradient)(U, d_h @ A).sum(0) for product, U, A in factors]
        return d_theta + gradient_of(structure, products, d_h @ memory_tm1.whole, d_theta.dtype)

    return Recursion(first, move, gradient, draws=True)


def _one_less(U: jax.Array, A: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U (rows, r + 1) and A (others, r + 1) with one column less each, of which U Aᵀ is the mean of the product."""
    (Q_U, R_U), (Q_A, R_A) = thin_qr(U), thin_qr(A)
    L, d, R = small_svd(R_U @ R_A.T)
    X = least_variance(d, key)
    return Q_U @ L @ X, Q_A @ R @ X


def least_variance(d: jax.Array, key: jax.Array) -> jax.Array:
    """X (r + 1, r) with E X Xᵀ = diag(d), d ≥ 0 falling, of the least variance that r columns allow.

        X  =  diag(signs) H diag(scale)

    The m largest d stand as they are. The others have k = r − m columns for k + 1 numbers, of the sum s: they are
    mixed, where m is the least number with d_{m+1} k ≤ s. The columns of H are orthonormal, and orthogonal to the unit
    vector z, z_i² = 1 − d_i k / s on what is mixed, so that the mean of X Xᵀ is s / k · (1 − z_i²) = d_i there. The
    variance is s² / k − Σ d_i² over what is mixed.
    """
    r = len(d) - 1
    # A number of the size of rounding would be mixed with another, for nothing.
    d = jnp.where(d > 4 * jnp.finfo(d.dtype).eps * d[0], d, 0)
    sums = jnp.cumsum(d[::-1])[::-1]
    columns = jnp.arange(r, 0, -1).astype(d.dtype)  # k, for m = 0 ... r - 1
    m = jnp.argmax(d[:r] * columns <= sums[:r])  # the first that holds; the last one always does
    s, k = sums[m], columns[m]
    mixed = jnp.arange(r + 1) >= m
    share = jnp.where(s > 0, d * k / jnp.where(s > 0, s, 1), k / (k + 1))
    z = jnp.where(mixed, jnp.sqrt(jnp.clip(1 - share, 0)), 0)
    # A reflection takes the last axis to -z: its other columns are orthonormal, and orthogonal to z.
    w = z.at[r].add(1)
    H = jnp.eye(r + 1, dtype=d.dtype) - 2 * jnp.outer(w, w) / jnp.dot(w, w)
    scale = jnp.sqrt(jnp.where(mixed, s / k, d))[:r]
    signs = jax.random.rademacher(key, (r + 1, 1), d.dtype)
    return signs * H[:, :r] * scale[None]
