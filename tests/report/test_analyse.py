"""What the analysis says: rows per leaf with the reason, recurrences, and costs that agree with the real arrays."""

from __future__ import annotations

import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import analyse, deep_eprop, stack
from tests.zoo import cells, networks, problem

STOCK_DENSE = {"linen_simple": 1, "linen_gru": 1, "linen_mgu": 1, "linen_lstm": 2, "linen_optimized_lstm": 2}


def first(p):
    return jax.tree.map(lambda leaf: leaf[0], p.xs)


def report(name):
    p = problem(name)
    return analyse(p.network, p.params, p.carry, first(p))


@pytest.mark.parametrize("name", list(STOCK_DENSE))
def test_stock_dense_cells_keep_one_row_per_carry_leaf(name):
    node = report(name).nodes[0]
    assert node.recurrence == "localised"
    assert [leaf.rows for leaf in node.leaves] == [STOCK_DENSE[name]] * len(node.leaves)
    assert {leaf.kind for leaf in node.leaves} == {"local"}
    assert [leaf.exact_rows for leaf in node.leaves] == [node.carry_size] * len(node.leaves)


def test_a_readout_keeps_no_trace():
    node = report("stack_2").nodes[1]
    assert node.recurrence == "feed-forward"
    assert [leaf.rows for leaf in node.leaves] == [0, 0]


def test_conv_lstm_kernels_are_dense_rows_and_the_table_says_so():
    analysis = report("linen_conv_lstm")
    node = analysis.nodes[0]
    kernels = [leaf for leaf in node.leaves if "kernel" in leaf.name]
    assert kernels
    assert all(leaf.kind == "dense" and leaf.rows == node.carry_size for leaf in kernels)
    assert "conv_general_dilated" in str(analysis)


@pytest.mark.parametrize("name", [name for name, cell in cells().items() if cell.elementwise])
def test_elementwise_carries_are_found_also_in_exact_mode(name):
    node = report(name).nodes[0]
    assert node.recurrence == ("element-wise" if node.carry_size else "feed-forward")
    assert all(leaf.rows == leaf.exact_rows for leaf in node.leaves)
    assert all(leaf.kind in ("local", "none") for leaf in node.leaves)


@pytest.mark.parametrize("name", [name for name, cell in cells().items() if not cell.elementwise])
def test_other_carries_are_not(name):
    assert report(name).nodes[0].recurrence in ("localised", "dense", "feed-forward")


PATHS = {
    # cell: (recurrence, leaves whose trace has dense rows)
    "custom_jvp_spike": ("localised", ""),
    "custom_vjp_spike": ("localised", ""),
    "weight_twice": ("localised", ""),
    "weight_tied_transpose": ("localised", "U"),
    "weight_norm": ("localised", ""),
    "weight_masked": ("localised", ""),
    "inside_cond": ("dense", "U V b"),
    "inside_scan": ("dense", "U"),
    "convolution": ("dense", "k"),
    "einsum_heads": ("localised", ""),
    "einsum_shared_heads": ("localised", "U"),
    "interleaved_gates": ("localised", ""),
    "checkpoint": ("localised", ""),
    "lstm_stacked": ("dense", "U W b"),
    "lstm_packed": ("dense", "U W b"),
    "lstm_projection": ("dense", "U W b"),
    "two_sizes": ("localised", ""),
    "scaled_before": ("localised", "s"),
    "gru_reset_before": ("dense", "Ur Wr br"),
    "layer_norm": ("dense", "U W"),
    "complex_dense": ("localised", ""),
}


@pytest.mark.parametrize("name", list(PATHS))
def test_which_path_an_odd_cell_takes(name):
    node = report(name).nodes[0]
    assert (node.recurrence, " ".join(leaf.name for leaf in node.leaves if leaf.kind == "dense")) == PATHS[name]


FEW = ["stack_2", "stack_3_spiking", "stack_5_recurrent", "graph_feed_forward", "graph_two_outputs", "depth_4_between"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in networks() if name not in FEW]


@pytest.mark.parametrize("name", [*cells(), *FEW, *OTHERS])
def test_bytes_agree_with_the_arrays(name):
    p = problem(name)
    for mode in analyse(p.network, p.params, p.carry, first(p)).modes:
        learner = deep_eprop(p.network, exact=mode.exact, hops=mode.hops)
        state = jax.eval_shape(learner.init, p.params, p.carry, first(p))
        assert mode.cost.trace_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.traces))
        arrays = [
            leaf for leaf in jax.tree.leaves(state.pending) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        assert mode.cost.pending_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def test_masked_leaves_have_no_bytes_and_a_zero_gradient():
    network = stack(nn.GRUCell(features=5), nn.GRUCell(features=4))
    xs = jax.random.normal(jax.random.key(0), (4, 2, 3), jnp.float32)
    params, carry = network.init(jax.random.key(1), xs[0])
    mask = (False, jax.tree.map(lambda leaf: leaf.ndim == 2, params[1]))
    learner, full = deep_eprop(network, trainable=mask), deep_eprop(network)
    state = learner.init(params, carry, xs[0])
    assert set(state.traces) == {"1 <- 1"}
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params[1]) if leaf.ndim == 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.traces)) == 2 * kernels
    analysis = analyse(network, params, carry, xs[0], trainable=mask)
    assert analysis.modes[1].cost.trace_bytes == 4 * 2 * kernels
    assert {leaf.kind for leaf in analysis.nodes[0].leaves} == {"masked"}

    def loss_fn(y, target):
        return jnp.sum((y - target) ** 2)

    run = [jax.jit(each.value_and_grad(loss_fn)) for each in (learner, full)]
    _, grads = run[0](params, state, xs, jnp.zeros(4, jnp.float32))
    _, needed = run[1](params, full.init(params, carry, xs[0]), xs, jnp.zeros(4, jnp.float32))
    full_mask = (jax.tree.map(lambda _: False, params[0]), mask[1])
    for flag, a, b in zip(*map(jax.tree.leaves, (full_mask, grads, needed)), strict=True):
        assert jnp.allclose(a, b if flag else 0, rtol=1e-4, atol=1e-7)


def test_local_leaves_never_meet_a_dense_jacobian():
    """In the whole program of hops=0 no array has n x |theta| numbers for a kernel."""
    network = stack(nn.GRUCell(features=17), nn.GRUCell(features=17))
    xs = jnp.zeros((3, 1, 17), jnp.float32)
    params, carry = network.init(jax.random.key(1), xs[0])
    learner = deep_eprop(network, hops=0)
    run = learner.value_and_grad(lambda y, target: jnp.sum((y - target) ** 2))
    jaxpr = jax.make_jaxpr(run)(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(3, jnp.float32))

    def sizes(jaxpr):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for eqn in jaxpr.eqns:
            yield from (var.aval.size for var in eqn.outvars)
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        yield from sizes(inner)

    assert max(sizes(jaxpr)) < 17 * 17 * 17


def test_the_table_reads_well():
    text = str(report("stack_3"))
    assert "node 0: carry h [3]; recurrence localised" in text
    assert "deep e-prop, hops=0" in text
    assert "multiply-adds a step" in text


def test_one_function_of_several_layers_is_pointed_out():
    def two_layers(params, carry, x):
        low = jnp.tanh(params["low"] @ carry[0] + x)
        high = jnp.tanh(params["high"] @ carry[1] + low)
        return (low, high), high

    params = {"low": jnp.eye(3), "high": jnp.eye(3)}
    carry = (jnp.zeros((2, 3)),) * 2
    assert "one node" in str(analyse(two_layers, params, carry, jnp.zeros((2, 3))))


def test_ranks_are_listed_for_the_modes_that_have_them():
    p = problem("depth_4")
    modes = analyse(p.network, p.params, p.carry, first(p), rank=2).modes
    assert [(mode.exact, mode.hops) for mode in modes if mode.rank is None] == [
        (e, h) for e in (True, False) for h in (None, 1, 0)
    ]
    assert [(mode.exact, mode.hops) for mode in modes if mode.rank == 2] == [(False, None), (False, 0)]


def peak_of_a_plan(cell, features, rank):
    """Python's peak bytes while a learner analyses a cell of as many inputs as units."""
    learner = deep_eprop(cell(features=features), rank=rank)
    x = jax.ShapeDtypeStruct((2, features), jnp.float32)
    xs, targets = jax.ShapeDtypeStruct((4, *x.shape), x.dtype), jax.ShapeDtypeStruct((4,), x.dtype)
    params, carry = jax.eval_shape(learner.network.init, jax.random.key(0), x)
    tracemalloc.start()
    try:
        state = jax.eval_shape(learner.init, params, carry, x)
        jax.eval_shape(learner.value_and_grad(lambda y, target: jnp.sum(y)), params, state, xs, targets)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cell, rank", [(nn.GRUCell, None), (nn.OptimizedLSTMCell, 4)], ids=["gru", "wide_lstm"])
def test_no_label_has_the_size_of_a_weight(cell, rank):
    """Labels of a weight are a vector along one of its axes: 16 times the weights cost no more than some vectors."""
    small, large = (peak_of_a_plan(cell, features, rank) for features in (512, 2048))
    assert large - small < 2048 * 2048  # bytes: less than one boolean per entry of one weight


@pytest.mark.parametrize("name", ["stack_2", pytest.param("deep_below_deep", marks=pytest.mark.slow)])
def test_a_projected_carry_is_listed_with_its_exact_bytes(name):
    p = problem(name)
    mode = analyse(p.network, p.params, p.carry, first(p), carry_rank=1).modes[-1]
    assert mode.name == "projected carry, carry_rank=1"
    state = jax.eval_shape(deep_eprop(p.network, carry_rank=1).init, p.params, p.carry, first(p))
    for predicted, held in ((mode.cost.trace_bytes, state.traces), (mode.cost.pending_bytes, state.pending)):
        assert predicted == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    *_, whole, factored = analyse(p.network, p.params, p.carry, first(p), carry_rank=1, carry_factor=2).modes
    assert (whole.name, factored.name) == (mode.name, "projected carry, carry_rank=1, carry_factor=2")
    state = jax.eval_shape(deep_eprop(p.network, carry_rank=1, carry_factor=2).init, p.params, p.carry, first(p))
    assert factored.cost.trace_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.traces))
    more = analyse(p.network, p.params, p.carry, first(p), carry_rank=2).modes[-1]
    assert more.cost.multiply_adds > mode.cost.multiply_adds
