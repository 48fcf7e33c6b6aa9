"""Influences in two factors say what the products written out would."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, deep_eprop
from deepeprop_jax.jaxpr.computed_once import computed_once
from deepeprop_jax.traces.block import Block, Rows
from deepeprop_jax.traces.joint_rows import joint
from deepeprop_jax.traces.output_influence import Factored, Influence, add_leaves

BATCH = 2


def swapped(features: int) -> Cell:
    """Two leaky tanh populations, shown in the other order: rows that do not run through the carry in order."""

    def init(key, x):
        w, r = jax.random.split(key)
        shape = (2 * features, 2 * features)
        params = {"w": jax.random.normal(w, (x.shape[-1], 2 * features)), "r": jax.random.normal(r, shape)}
        return params, (jnp.zeros((x.shape[0], features)), jnp.zeros((x.shape[0], features)))

    def apply(params, carry, x):
        drive = jnp.tanh(x @ params["w"] + jnp.concatenate(carry, axis=-1) @ params["r"])
        a, b = jnp.split(drive, 2, axis=-1)
        carry = (0.5 * carry[0] + a, 0.9 * carry[1] + b)
        return carry, carry[::-1]

    return Cell(init, apply)


CELLS = {"gru": nn.GRUCell(3), "lstm": nn.LSTMCell(3), "mgu": nn.MGUCell(3), "swapped": swapped(3)}


def node_with_traces(cell):
    """The node, its blocks, what is trained, and random own traces."""
    learner = deep_eprop(cell)
    x = jnp.ones((BATCH, 4))
    params, carry = jax.tree.map(lambda a: a.astype(float), learner.network.init(jax.random.key(0), x))
    plan = learner.plan(params, carry, x)
    rng = np.random.default_rng(0)
    traces = tuple(jnp.asarray(rng.standard_normal((BATCH, block.rows, block.columns))) for block in plan.own[0])
    return plan.nodes[0], plan.own[0], plan.trained[0], traces, rng


def written_out(node, block, trace):
    """All n rows of a trace that holds those of one unit each, (batch, n, columns)."""
    if block.unit is None:
        return np.asarray(trace)
    rows = np.zeros((BATCH, node.carry.size, block.columns))
    for column, unit in enumerate(block.unit.ravel()):
        for slot in range(block.rows):
            rows[:, node.units.grid[slot, unit], column] = trace[:, slot, column]
    return rows


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("name", CELLS)
def test_factors_multiply_out(name):
    """Through a selection of the carry, a matrix, another one, and a sum of two, in every leaf's columns."""
    node, blocks, trained, traces, rng = node_with_traces(CELLS[name])
    rows, n = node.cut.output_rows, node.carry.size
    assert rows is not None
    wide = {}
    for block, trace in zip(blocks, traces, strict=True):
        add_leaves(node.params, block, written_out(node, block, trace), wide)
    dense = np.concatenate([wide[i] for i in trained], axis=-1)

    join = joint(blocks)
    for parts in ((blocks, traces), (join.blocks, join.join(traces))):

        def influence(matrix, parts=parts):
            return Influence(node, trained, tuple(Factored(b, matrix, s) for b, s in zip(*parts, strict=True)))

        def close(found, wanted):
            np.testing.assert_allclose(found.multiplied_out(BATCH, wanted.shape[1], jnp.float64), wanted, atol=1e-12)

        selected, m = influence(rows), jnp.asarray(rng.standard_normal((BATCH, 4, rows.size)))
        close(selected, dense[:, rows])
        close(selected.through(m), m @ dense[:, rows])
        close(selected.map(lambda part: part[:, ::-1]), dense[:, rows][:, ::-1])
        full = jnp.asarray(rng.standard_normal((BATCH, 4, n)))
        close(influence(full), full @ dense)
        both = selected.through(m).plus(influence(full))
        close(both, m @ dense[:, rows] + full @ dense)
        more = Influence(node, trained, leaves={trained[0]: jnp.ones((BATCH, 4, node.params.sizes[trained[0]]))})
        first = np.arange(dense.shape[-1]) < node.params.sizes[trained[0]]
        close(both.plus(more), m @ dense[:, rows] + full @ dense + first.astype(float))
        whole = Influence(node, trained, whole=jnp.ones((BATCH, 4, dense.shape[-1])))
        close(both.plus(whole), m @ dense[:, rows] + full @ dense + 1)


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("name", CELLS)
def test_local_rows_as_one_array(name):
    """The leaves of a stock cell are one; what is joined comes apart again."""
    _, blocks, _, traces, _ = node_with_traces(CELLS[name])
    join = joint(blocks)
    assert len(join.blocks) == 1
    for found, wanted in zip(join.split(join.join(traces), blocks), traces, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_rows_in_another_order_stay_apart():
    """Where a leaf runs through the units each several times, one array would need a gather."""
    blocks = (
        Block(Rows.LOCAL, (0,), np.tile(np.arange(3), 2), 1, 6),
        Block(Rows.DENSE, (1,), None, 3, 4),
        Block(Rows.LOCAL, (2,), np.repeat(np.arange(3), 2), 1, 6),
    )
    join = joint(blocks)
    assert join.blocks == blocks
    traces = tuple(jnp.arange(2.0 * b.rows * b.columns).reshape(2, b.rows, b.columns) for b in blocks)
    for found, wanted in zip(join.split(join.join(traces), blocks), traces, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.mixed_promotion
def test_nothing_says_nothing():
    node, _, trained, _, _ = node_with_traces(CELLS["gru"])
    found = Influence(node, trained).multiplied_out(BATCH, 3, jnp.float64)
    assert not found.any()
    assert found.shape[:2] == (BATCH, 3)


@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_what_is_stored_is_the_same(size):
    tree = {"a": jnp.arange(3.0 * size).reshape(3, size), "b": jnp.arange(4.0)}
    for found, wanted in zip(*map(jax.tree.leaves, (jax.jit(computed_once)(tree), tree)), strict=True):
        np.testing.assert_array_equal(found, wanted)
