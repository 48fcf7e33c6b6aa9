"""Literal check of the paper: eq. 9 for the two-layer net of its Figure 2, eq. 11 for a diamond, typed out in numpy.

No automatic differentiation on this side: every matrix is written by hand for h_t = tanh(W h_{t-1} + U u_t), y_t = h_t.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop
from deepeprop_jax.network.build import graph, stack
from deepeprop_jax.network.cell import Cell
from deepeprop_jax.reference import Pair, Recursion, paper_recursion
from deepeprop_jax.traces.block import Rows

TOLERANCE = 1e-12
STEPS, BATCH, INPUTS = 3, 2, 3

TANH = Pair(
    lambda params, carry_tm1, x: jnp.tanh(params["W"] @ carry_tm1 + params["U"] @ x),
    lambda params, carry_t, carry_tm1, x: carry_t,
)


def tanh_cell(units: int) -> Cell:
    def init(key, x):
        keys = jax.random.split(key, 3)
        params = {
            "U": 0.7 * jax.random.normal(keys[0], (units, x.shape[-1])),
            "W": 0.7 * jax.random.normal(keys[1], (units, units)),
        }
        return params, 0.5 * jax.random.normal(keys[2], (x.shape[0], units))

    return Cell(init, TANH.apply)


FIGURE_2 = stack(tanh_cell(4), tanh_cell(3))
DIAMOND = graph(
    {
        "a": (tanh_cell(3), "input"),
        "b": (tanh_cell(2), "a"),
        "c": (tanh_cell(4), "a"),
        "d": (tanh_cell(3), ("b", "c")),
    },
    outputs="d",
)


class Partials(NamedTuple):
    """One layer's step for one example: the new h and the three matrices."""

    h: np.ndarray
    by_h_tm1: np.ndarray
    by_u: np.ndarray
    by_theta: np.ndarray


def tanh_step(params, h_tm1, u, localise) -> Partials:
    U, W = np.asarray(params["U"]), np.asarray(params["W"])
    h = np.tanh(W @ h_tm1 + U @ u)
    slope = np.diag(1 - h**2)
    # Deep e-prop keeps of ∂h_t/∂h_{t-1} what leads from a unit to itself.
    by_h_tm1 = slope @ (np.diag(np.diag(W)) if localise else W)
    # h_i reads row i of U and of W alone; θ is U row by row, then W row by row.
    by_theta = np.hstack([np.kron(slope, u), np.kron(slope, h_tm1)])
    return Partials(h, by_h_tm1, slope @ U, by_theta)


def equation_9(params, carry, xs, localise):
    """One example of FIGURE_2: (traces per step, outputs per step)."""
    h1, h2 = carry
    size1, size2 = (params[layer]["U"].size + params[layer]["W"].size for layer in (0, 1))
    e11, e22, e21 = np.zeros((h1.size, size1)), np.zeros((h2.size, size2)), np.zeros((h2.size, size1))
    traces, outputs = [], []
    for x in xs:
        layer1 = tanh_step(params[0], h1, x, localise)
        layer2 = tanh_step(params[1], h2, layer1.h, localise)
        e11 = layer1.by_h_tm1 @ e11 + layer1.by_theta
        e22 = layer2.by_h_tm1 @ e22 + layer2.by_theta
        e21 = layer2.by_h_tm1 @ e21 + layer2.by_u @ e11
        h1, h2 = layer1.h, layer2.h
        traces.append({("0", "0"): e11, ("1", "1"): e22, ("1", "0"): e21})
        outputs.append(h2)
    return traces, outputs


def equation_11(params, carry, xs, localise):
    """One example of DIAMOND: the trace of d sums over its parents b and c, each with its own columns of U."""
    h = dict(carry)
    width = {name: value.size for name, value in h.items()}
    size = {name: sum(np.size(leaf) for leaf in leaves.values()) for name, leaves in params.items()}
    e = {v + k: np.zeros((width[v], size[k])) for v, k in ("aa", "bb", "cc", "dd", "ba", "ca", "db", "dc", "da")}
    traces, outputs = [], []
    for x in xs:
        a = tanh_step(params["a"], h["a"], x, localise)
        b = tanh_step(params["b"], h["b"], a.h, localise)
        c = tanh_step(params["c"], h["c"], a.h, localise)
        d = tanh_step(params["d"], h["d"], np.concatenate([b.h, c.h]), localise)
        d_by_b, d_by_c = d.by_u[:, : width["b"]], d.by_u[:, width["b"] :]

        e["aa"] = a.by_h_tm1 @ e["aa"] + a.by_theta
        e["bb"] = b.by_h_tm1 @ e["bb"] + b.by_theta
        e["cc"] = c.by_h_tm1 @ e["cc"] + c.by_theta
        e["dd"] = d.by_h_tm1 @ e["dd"] + d.by_theta
        e["ba"] = b.by_h_tm1 @ e["ba"] + b.by_u @ e["aa"]
        e["ca"] = c.by_h_tm1 @ e["ca"] + c.by_u @ e["aa"]
        e["db"] = d.by_h_tm1 @ e["db"] + d_by_b @ e["bb"]
        e["dc"] = d.by_h_tm1 @ e["dc"] + d_by_c @ e["cc"]
        e["da"] = d.by_h_tm1 @ e["da"] + d_by_b @ e["ba"] + d_by_c @ e["ca"]

        h = {"a": a.h, "b": b.h, "c": c.h, "d": d.h}
        traces.append({tuple(pair): trace for pair, trace in e.items()})
        outputs.append(d.h)
    return traces, outputs


class Problem(NamedTuple):
    """A network, its arguments, and what the equations give when typed by hand."""

    network: Cell
    params: dict | tuple
    carry: dict | tuple
    xs: np.ndarray
    targets: np.ndarray
    traces: dict[tuple[str, str], np.ndarray]
    grads: dict[str, np.ndarray]


def loss_fn(y, target):
    return 0.5 * jnp.sum((y - target) ** 2)


@functools.cache
def problem(name: str, localise: bool) -> Problem:
    network, equation, top = {"eq. 9": (FIGURE_2, equation_9, "1"), "eq. 11": (DIAMOND, equation_11, "d")}[name]
    params, carry = network.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS)))
    draw = np.random.default_rng(1)
    xs, targets = draw.normal(size=(STEPS, BATCH, INPUTS)), draw.normal(size=(STEPS, BATCH, 3))

    examples = [
        equation(params, jax.tree.map(lambda leaf, b=b: np.asarray(leaf[b]), carry), xs[:, b], localise)
        for b in range(BATCH)
    ]
    traces = {
        pair: np.array([[example[0][t][pair] for example in examples] for t in range(STEPS)])
        for pair in examples[0][0][0]
    }
    outputs = np.array([[example[1][t] for example in examples] for t in range(STEPS)])
    # dL/dθ^k = Σ_t ∂L_t/∂h^top_t ε^{top,k}_t, the loss being half a squared error.
    grads = {k: np.einsum("tbi,tbip->p", outputs - targets, trace) for (v, k), trace in traces.items() if v == top}
    return Problem(network, params, carry, xs, targets, traces, grads)


@functools.cache
def recursion(name: str, localise: bool) -> Recursion:
    case = problem(name, localise)
    run = paper_recursion(case.network, [TANH] * len(case.network.graph.nodes), localise=localise)
    return jax.jit(lambda *arguments: run(*arguments, loss_fn))(case.params, case.carry, case.xs, case.targets)


def assert_same(seen, wanted):
    seen, wanted = np.asarray(seen), np.asarray(wanted)
    assert seen.shape == wanted.shape
    assert np.linalg.norm(seen - wanted) <= TOLERANCE * np.linalg.norm(wanted)


EVERY_PROBLEM = pytest.mark.parametrize(
    ("name", "localise"), [(name, localise) for name in ("eq. 9", "eq. 11") for localise in (False, True)]
)


@EVERY_PROBLEM
def test_the_recursion_gives_the_traces_typed_by_hand(name, localise):
    wanted, seen = problem(name, localise).traces, recursion(name, localise)
    assert set(seen.carry_sensitivity) == set(wanted)
    for pair, trace in wanted.items():
        assert_same(seen.carry_sensitivity[pair], trace)
        assert_same(seen.output_sensitivity[pair], trace)  # y = h


@EVERY_PROBLEM
def test_the_final_contraction_gives_the_gradient_typed_by_hand(name, localise):
    case, seen = problem(name, localise), recursion(name, localise)
    for k, wanted in case.grads.items():
        own = seen.grads[int(k) if k.isdigit() else k]
        assert_same(np.concatenate([np.ravel(own["U"]), np.ravel(own["W"])]), wanted)


def test_without_recurrence_between_units_the_own_trace_is_one_number_per_synapse():
    # The trace of unit i to the weights into unit j vanishes for j != i in the own layer, and only there.
    traces = problem("eq. 9", localise=True).traces
    units = FIGURE_2.init(jax.random.key(0), jnp.zeros((BATCH, INPUTS)))[1][0].shape[-1]
    own = traces["0", "0"][..., units * INPUTS :].reshape(STEPS, BATCH, units, units, units)
    above = traces["1", "0"][..., units * INPUTS :].reshape(STEPS, BATCH, -1, units, units)
    other_unit = ~np.eye(units, dtype=bool)
    assert np.all(own[:, :, other_unit] == 0) and np.all(own[:, :, ~other_unit] != 0)
    assert np.all(above != 0)
    exact = problem("eq. 9", localise=False).traces["0", "0"][..., units * INPUTS :]
    assert np.any(exact.reshape(own.shape)[-1][:, other_unit] != 0)


def full(block, trace):
    """A trace as the full Jacobian (batch, n, columns): a local one has its one row at the unit that it reaches."""
    if block.kind is Rows.DENSE:
        return np.asarray(trace)
    reaches = np.arange(block.unit.max() + 1)[:, None] == block.unit.ravel()[None]
    return np.where(reaches, np.asarray(trace), 0)


@EVERY_PROBLEM
def test_the_library_holds_the_traces_typed_by_hand(name, localise):
    """Full Jacobians with exact=True; of the own ones with exact=False, the unit-local rows alone."""
    case = problem(name, localise)
    learner = deep_eprop(case.network, exact=not localise)
    state = learner.init(case.params, case.carry, case.xs[0])
    plan = learner.plan(case.params, case.carry, case.xs[0])
    blocks = {node.name: plan.own[v] for v, node in enumerate(plan.nodes)}
    run = jax.jit(learner.value_and_grad(loss_fn))
    total = jax.tree.map(jnp.zeros_like, case.params)
    for t in range(STEPS):
        (_, state), grads = run(case.params, state, case.xs[t : t + 1], case.targets[t : t + 1])
        total = jax.tree.map(jnp.add, total, grads)
        for (v, k), wanted in case.traces.items():
            seen = state.traces[f"{v} <- {k}"]
            if v == k:
                assert {block.kind for block in blocks[v]} == {Rows.LOCAL if localise else Rows.DENSE}
                seen = np.concatenate([full(block, part) for block, part in zip(blocks[v], seen, strict=True)], axis=-1)
            assert_same(seen, wanted[t])
    for k, wanted in case.grads.items():
        own = total[int(k) if k.isdigit() else k]
        assert_same(np.concatenate([np.ravel(own["U"]), np.ravel(own["W"])]), wanted)
