"""The ``stop_gradient`` oracles and the paper's recursion, against twins with ``stop_gradient`` written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.lax import stop_gradient as sg

from deepeprop_jax.network.build import graph, stack
from deepeprop_jax.network.cell import Cell
from deepeprop_jax.reference import Pair, bptt, localised, paper_recursion, stop_gradient_oracle
from tests.small_cells import (
    BATCH,
    INPUTS,
    STEPS,
    assert_same,
    complex_pair,
    complex_problem,
    differs,
    normal,
    problem,
    readout_cell,
    readout_pair,
    squared_error,
    tanh_cell,
    tanh_pair,
    two_layers,
    without_keys,
)


def off_diagonal(w):
    return w - jnp.diag(jnp.diag(w))


def gradient_of(apply, arguments):
    """Plain BPTT of a cell typed by hand; BPTT itself has its own tests."""
    return jax.jit(bptt(Cell(None, apply), squared_error))(*arguments)


def test_localised_leaky_tanh_is_the_twin_typed_by_hand():
    pair = Pair(
        lambda p, h, x: jax.nn.sigmoid(p["a"]) * h + jnp.tanh(h @ p["w"] + x @ p["u"]), lambda p, h_t, h_tm1, x: h_t
    )

    def twin(p, h, x):
        recurrent = sg(h) @ off_diagonal(p["w"]) + h * jnp.diag(p["w"])
        carry = jax.nn.sigmoid(p["a"]) * h + jnp.tanh(recurrent + x @ p["u"])
        return carry, carry

    network = Cell(None, pair.apply)
    params = {"a": normal(3, 3), "w": normal(4, 3, 3), "u": normal(5, INPUTS, 3)}
    arguments = (params, normal(6, BATCH, 3), normal(1, STEPS, BATCH, INPUTS), normal(2, STEPS, BATCH, 3))
    seen = jax.jit(stop_gradient_oracle(network, squared_error, [pair]))(*arguments)
    assert_same(seen, gradient_of(twin, arguments))
    assert differs(seen, jax.jit(bptt(network, squared_error))(*arguments))


def lstm_twin(h_or_local):
    """An LSTM whose recurrent product is given; unit i is (c_i, h_i)."""

    def apply(p, carry, x):
        c, h = carry
        i, f, g, o = (h_or_local(h, p["w"][gate]) + x @ p["u"][gate] + p["b"][gate] for gate in range(4))
        c_t = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h_t = jax.nn.sigmoid(o) * jnp.tanh(c_t)
        return (c_t, h_t), h_t

    return apply


def test_localised_lstm_couples_the_two_numbers_of_a_unit():
    exact = lstm_twin(lambda h, w: h @ w)
    pair = Pair(lambda p, carry, x: exact(p, carry, x)[0], lambda p, carry_t, carry_tm1, x: carry_t[1])
    network = Cell(None, pair.apply)
    params = {"w": normal(3, 4, 3, 3), "u": normal(4, 4, INPUTS, 3), "b": normal(5, 4, 3)}
    carry = (normal(6, BATCH, 3), normal(7, BATCH, 3))
    arguments = (params, carry, normal(1, STEPS, BATCH, INPUTS), normal(2, STEPS, BATCH, 3))
    twin = lstm_twin(lambda h, w: sg(h) @ off_diagonal(w) + h * jnp.diag(w))
    assert_same(jax.jit(stop_gradient_oracle(network, squared_error, [pair]))(*arguments), gradient_of(twin, arguments))


def test_leaves_of_unequal_shape_share_no_units():
    def step(p, a, b, a_in_b, b_in_a, local_a):
        a_t = jnp.tanh(local_a(a, p["w"]) + b_in_a.sum(0) + p["bias"])
        b_t = 0.5 * b + jnp.outer(p["v"], a_in_b)
        return {"a": a_t, "b": b_t}

    def new_carry(p, h, x):
        return step(p, h["a"] + x, h["b"], h["a"], h["b"], lambda a, w: a @ w)

    def output(p, h_t, h_tm1, x):
        return h_t["a"] * h_t["b"][0] + h_tm1["b"][1]

    def twin(p, h, x):
        cut = sg(h)
        local = lambda a, w: sg(a) @ off_diagonal(w) + a * jnp.diag(w)  # noqa: E731
        carry = step(p, h["a"] + x, h["b"], cut["a"], cut["b"], local)
        return carry, output(p, carry, h, x)

    pair = Pair(new_carry, output)
    params = {"w": normal(3, 3, 3), "v": normal(4, 2), "bias": normal(5, 3)}
    carry = {"a": normal(6, BATCH, 3), "b": normal(7, BATCH, 2, 3)}
    arguments = (params, carry, normal(1, STEPS, BATCH, 3), normal(2, STEPS, BATCH, 3))
    network = Cell(None, pair.apply)
    assert_same(jax.jit(stop_gradient_oracle(network, squared_error, [pair]))(*arguments), gradient_of(twin, arguments))


def test_localised_keeps_the_values():
    pair, network = tanh_pair(), tanh_cell(4)
    params, carry, xs, _ = problem(network)
    one = jax.tree.map(lambda leaf: leaf[0], carry)
    assert_same(localised(pair)(params, one, xs[0, 0]), pair.apply(params, one, xs[0, 0]))


@pytest.mark.parametrize(("hops", "localise"), [(0, True), (1, False), (2, True)])
def test_hops_by_hand_on_three_layers_with_a_feed_forward_node_between(hops, localise):
    # Node 1 has no carry and is free: the recurrent nodes 0, 2, 3 are one hop apart.
    network = stack(tanh_cell(4), readout_cell(2), tanh_cell(3), tanh_cell(2))
    pairs = [tanh_pair(), readout_pair, tanh_pair(), tanh_pair()]
    stopped = {
        0: {0: (2, 3), 1: (2, 3), 2: (3,), 3: ()},
        1: {0: (3,), 1: (3,), 2: (), 3: ()},
        2: {0: (), 1: (), 2: (), 3: ()},
    }[hops]
    cells = [localised(pair) if localise else pair.apply for pair in pairs]

    def cut_network(nodes):
        def apply(params, carry, x):
            new = []
            for node, cell in enumerate(cells):
                carry_t, x = cell(params[node], sg(carry[node]) if node in nodes else carry[node], x)
                new.append(carry_t)
            return tuple(new), x

        return apply

    arguments = problem(network)
    seen = jax.jit(stop_gradient_oracle(network, squared_error, pairs, localise=localise, hops=hops))(*arguments)
    by_set = {nodes: gradient_of(cut_network(nodes), arguments) for nodes in set(stopped.values())}
    # Node 1, below two recurrent nodes: one hop to node 2, two to node 3, as node 0.
    assert_same(seen[1], tuple(by_set[stopped[node]][1][node] for node in range(4)))
    assert_same(seen[0], by_set[stopped[0]][0])


def test_hops_count_the_shortest_path():
    nodes = {"a": (tanh_cell(3), "input"), "b": (tanh_cell(2), "a"), "c": (tanh_cell(3), ("a", "b"))}
    network, pairs = graph(nodes, outputs=("a", "c")), [tanh_pair()] * 3
    arguments = problem(network)

    def oracle(hops):
        return jax.jit(stop_gradient_oracle(network, squared_error, pairs, localise=False, hops=hops))(*arguments)

    # a reaches c in one hop by the skip, so one hop is everything; a reads the loss itself, so no hops is not nothing.
    full = jax.jit(bptt(network, squared_error))(*arguments)
    assert_same(oracle(1), full)
    assert differs(oracle(0)[1]["a"], full[1]["a"]) and differs(oracle(0)[1]["b"], full[1]["b"])
    assert_same(oracle(0)[1]["c"], full[1]["c"])


@pytest.mark.parametrize("hops", [None, 1])
def test_a_deep_node_is_its_layers(hops):
    deep = stack(tanh_cell(4), stack(tanh_cell(3), depth=3), readout_cell(3))
    plain = stack(tanh_cell(4), *[tanh_cell(3)] * 3, readout_cell(3))
    params, carry, xs, targets = problem(deep)
    flat_params = (params[0], *(jax.tree.map(lambda leaf, i=i: leaf[i], params[1]) for i in range(3)), params[2])
    flat_carry = (carry[0], *(carry[1][:, i] for i in range(3)), carry[2])
    pairs = [tanh_pair(), tanh_pair(), readout_pair]
    flat_pairs = [tanh_pair()] * 4 + [readout_pair]
    oracle = jax.jit(stop_gradient_oracle(deep, squared_error, pairs, hops=hops))
    flat_oracle = jax.jit(stop_gradient_oracle(plain, squared_error, flat_pairs, hops=hops))
    (loss, final), grads = oracle(params, carry, xs, targets)
    (flat_loss, flat_final), flat_grads = flat_oracle(flat_params, flat_carry, xs, targets)
    restacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *flat_grads[1:4])
    assert_same(loss, flat_loss)
    assert_same(final, (flat_final[0], jnp.stack(flat_final[1:4], axis=1), ()))
    assert_same(grads, (flat_grads[0], restacked, flat_grads[4]))


def diamond() -> tuple[Cell, list[Pair]]:
    nodes = {
        "low": (tanh_cell(2), "input"),
        "left": (tanh_cell(3), "low"),
        "right": (readout_cell(2), "low"),
        "top": (tanh_cell(2), ("left", "right", "input")),
    }
    return graph(nodes, outputs=("left", "top")), [tanh_pair(), tanh_pair(), readout_pair, tanh_pair()]


@pytest.mark.parametrize("localise", [False, True], ids=["exact", "localised"])
@pytest.mark.parametrize("topology", ["two layers", "diamond", "depth", "complex"])
def test_the_papers_recursion_gives_the_reference_gradient(topology, localise):
    if topology == "complex":
        network, arguments = complex_problem()
        pairs = [complex_pair]
    else:
        network, pairs = {
            "two layers": lambda: (two_layers(), [tanh_pair()] * 2),
            "diamond": diamond,
            "depth": lambda: (stack(tanh_cell(2), stack(tanh_cell(2), depth=2)), [tanh_pair()] * 2),
        }[topology]()
        arguments = problem(network)
    oracle = stop_gradient_oracle(network, squared_error, pairs) if localise else bptt(network, squared_error)
    recursion = paper_recursion(network, pairs, localise=localise)
    seen = jax.jit(lambda *arguments: recursion(*arguments, squared_error))(*arguments)
    (loss, carry), grads = jax.jit(oracle)(*arguments)
    if topology == "complex":
        wanted = without_keys(((loss, carry), grads))
        assert_same(without_keys(((seen.loss, seen.carry), seen.grads)), wanted)
    else:
        assert_same(((seen.loss, seen.carry), seen.grads), ((loss, carry), grads))


def test_single_precision_stays_single():
    network = two_layers()
    arguments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), problem(network))
    _, wanted = jax.jit(bptt(network, squared_error))(*arguments)
    _, oracle = jax.jit(stop_gradient_oracle(network, squared_error, [tanh_pair()] * 2, localise=False))(*arguments)
    paper = jax.jit(lambda *a: paper_recursion(network, [tanh_pair()] * 2)(*a, squared_error))(*arguments)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((wanted, oracle, paper)))
    assert_same(oracle, wanted, 2e-5)
    assert_same(paper.grads, wanted, 2e-5)


def test_bad_arguments_say_what_is_needed():
    network = two_layers()
    with pytest.raises(ValueError, match=r"One Pair per node .* \['0', '1'\]; seen 1 pairs"):
        stop_gradient_oracle(network, squared_error, [tanh_pair()])
    with pytest.raises(ValueError, match=r"hops .* seen -1"):
        stop_gradient_oracle(network, squared_error, [tanh_pair()] * 2, hops=-1)
