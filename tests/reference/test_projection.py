"""BPTT through few directions at the boundaries of segments: its limits, and the recursion in time that it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deepeprop_jax.reference import bptt, projected_bptt, truncated_bptt
from deepeprop_jax.reference.backpropagation import as_gradient, real_leaves, with_real_leaves
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import problem

NAMES = ["linen_gru", "linen_lstm", "complex_dense", "graph_skip"]


def numbers_of(tree) -> jax.Array:
    """(batch, N) the real coordinates of a carry."""
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in real_leaves(tree)], axis=-1)


def like(carry, rows):
    """Rows (R, N) of real coordinates as a pytree like the carry, with R in place of the batch."""
    sizes = [leaf[0].size for leaf in real_leaves(carry)]
    parts = jnp.split(jnp.asarray(rows), np.cumsum(sizes)[:-1], axis=-1)
    shaped = [x.reshape(len(x), *leaf.shape[1:]) for x, leaf in zip(parts, real_leaves(carry), strict=True)]
    return with_real_leaves(
        jax.tree.map(lambda leaf: jnp.zeros((len(rows), *leaf.shape[1:]), leaf.dtype), carry), shaped
    )


@pytest.mark.parametrize("name", NAMES)
def test_all_directions_are_bptt_and_none_is_truncated_bptt(name):
    p = problem(name, steps=7, batch=2)
    every = like(p.carry, np.eye(numbers_of(p.carry).shape[-1]))
    none = jax.tree.map(lambda leaf: leaf[:0], every)
    needed = {"all": bptt(p.network, p.loss_fn), "none": truncated_bptt(p.network, p.loss_fn, 3)}
    for kind, basis in (("all", every), ("none", none)):
        run = projected_bptt(p.network, p.loss_fn, segment_length=3, directions=basis, lift=basis)
        found, right = (jax.jit(f)(p.params, p.carry, p.xs, p.targets) for f in (run, needed[kind]))
        assert_same_gradient(found, right, FLOAT64, kind)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_recursion_of_a_projected_carry(name):
    """grad = sum of (inside + k A V),  V <- U (G + M A V): k of a segment's loss at its start, G and M of its end."""
    p = problem(name, steps=6, batch=2)
    U, A = np.random.default_rng(0).normal(size=(2, 3, numbers_of(p.carry).shape[-1]))
    run = projected_bptt(p.network, p.loss_fn, segment_length=2, directions=like(p.carry, U), lift=like(p.carry, A))
    found = jax.jit(run)(p.params, p.carry, p.xs, p.targets)

    def segment(theta, numbers, x, target):
        """(numbers of the last carry, loss) of a batch of one."""
        carry = like(p.carry, numbers[None])

        def step(carry, at):
            carry, y = jax.vmap(p.network.apply, (None, 0, 0))(with_real_leaves(p.params, theta), carry, at[0])
            return carry, p.loss_fn(y, at[1])

        end, losses = lax.scan(step, carry, (x, target))
        return numbers_of(end)[0], losses.sum()

    def cut(tree, start, example):
        """Two steps of one example; what has no axis of examples is all examples'."""
        here = jax.tree.map(lambda a: a[start : start + 2], tree)
        return jax.tree.map(lambda a: a[:, example : example + 1] if a.ndim > 1 else a, here)

    theta, derivatives = real_leaves(p.params), [jax.jit(jax.jacrev(segment, i)) for i in (1, 0)]
    grads = [jnp.zeros_like(leaf) for leaf in theta]
    for example in range(2):
        numbers, V = numbers_of(p.carry)[example], [jnp.zeros((3, *leaf.shape)) for leaf in theta]
        for start in range(0, 6, 2):
            here = (theta, numbers, cut(p.xs, start, example), cut(p.targets, start, example))
            (M, k), (G, inside) = (derivative(*here) for derivative in derivatives)
            grads = [g + d + jnp.tensordot(A @ k, v, 1) for g, d, v in zip(grads, inside, V, strict=True)]
            V = [jnp.tensordot(U, g, 1) + jnp.tensordot(U @ M @ A.T, v, 1) for g, v in zip(G, V, strict=True)]
            numbers = segment(*here)[0]
    assert_same_gradient(found[1], as_gradient(grads, p.params), FLOAT64)


def test_a_basis_of_another_shape_is_refused():
    p = problem("linen_gru", steps=4, batch=2)
    basis = like(p.carry, np.eye(numbers_of(p.carry).shape[-1]))
    wrong = jax.tree.map(lambda leaf: leaf[:, :-1], basis)
    with pytest.raises(ValueError, match="directions must be like the carry"):
        projected_bptt(p.network, p.loss_fn, segment_length=2, directions=wrong, lift=basis)(
            p.params, p.carry, p.xs, p.targets
        )
    with pytest.raises(ValueError, match="segment_length counts steps"):
        projected_bptt(p.network, p.loss_fn, segment_length=0, directions=basis, lift=basis)
