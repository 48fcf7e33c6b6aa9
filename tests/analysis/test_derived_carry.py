"""Carry leaves that are functions of others: which are found, and that their value stays what the cell gave it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import Cell, deep_eprop, stack
from deepeprop_jax.analysis.transition import cut_cell
from deepeprop_jax.cells import alif, lif
from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.reference import bptt
from tests.gradients import assert_same_gradient
from tests.zoo import cells, problem

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float64)


def derived(apply, params, carry, x) -> set[str]:
    """Names of the carry leaves that are set aside."""
    _, y = jax.eval_shape(apply, params, carry, x)
    views = [RealView(tree) for tree in (params, carry, x, y)]
    _, after = cut_cell(apply, *views)
    return set(views[1].names) - set(after.names)


def of_zoo(name: str) -> set[str]:
    p = problem(name)
    carry, x = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), t) for t in (p.carry, p.xs))
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), x)
    return derived(p.network.apply, p.params, carry, x)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lif", {"1"}),
        ("alif", {"2"}),
        ("lif_refractory", {"1"}),
        ("lif_zero_reset", {"1"}),
        ("alif_refractory", {"2"}),
        ("custom_vjp_spike", {"1"}),
        ("derived_leaves", {"a", "s"}),
        ("linen_lstm", set()),
        ("lstm_peephole", set()),
        ("lru", set()),
        ("rtu", set()),
        ("counter_and_key", set()),
        ("two_sizes", set()),
    ],
)
def test_which_leaves_of_the_zoo(name: str, wanted: set[str]) -> None:
    assert name in cells()
    assert of_zoo(name) == wanted


def test_what_decided_a_spike_must_be_in_the_new_carry() -> None:
    """Steps left before the step, which the new carry does not tell, and steps left after it, which it does."""

    def cell(before: bool):
        def apply(p, carry, x):
            v, _, left = carry
            v = 0.5 * v + x
            left_t = jnp.where(v > 1, 3, jnp.maximum(left - 1, 0))
            return (v, jnp.where((left if before else left_t) > 1, 0.0, jnp.tanh(v)), left_t), v

        return apply

    carry = (SHAPE, SHAPE, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert derived(cell(True), (), carry, SHAPE) == set()
    assert derived(cell(False), (), carry, SHAPE) == {"1"}


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(
    ("function", "is_derived"),
    [
        (lambda p, h, x, v: jnp.sin(v), True),
        (lambda p, h, x, v: jnp.where(v > 0, v, 0.1 * v), True),
        (lambda p, h, x, v: v, True),
        (lambda p, h, x, v: jnp.array([1.0, 2.0, 3.0]) * v, True),
        (lambda p, h, x, v: v / (1 + jnp.abs(v)), True),
        (lambda p, h, x, v: jnp.sqrt(v * v + 0.1), True),
        (lambda p, h, x, v: jnp.exp(-(v**2)) / 3.0, True),
        (lambda p, h, x, v: jnp.square(jnp.maximum(v, 1e200)), True),  # of a bound whose square overflows
        (lambda p, h, x, v: v / (0.5 + jnp.abs(v)).astype(jnp.int32), False),  # the denominator may be 0
        (lambda p, h, x, v: jnp.sqrt(jnp.abs(v)), False),  # an infinite slope at 0
        (lambda p, h, x, v: 1 / v, False),
        (lambda p, h, x, v: 1 / (1 + v), False),
        (lambda p, h, x, v: jnp.log(v**2), False),
        (lambda p, h, x, v: v**-2, False),
        (lambda p, h, x, v: p * v, False),  # a parameter of its own
        (lambda p, h, x, v: v + x, False),
        (lambda p, h, x, v: v * h[1], False),
        (lambda p, h, x, v: v[::-1], False),  # of another unit
        (lambda p, h, x, v: v / v.sum(), False),
        (lambda p, h, x, v: jnp.ones(3) @ jnp.outer(v, v), False),
        (lambda p, h, x, v: jnp.ones(3), False),
    ],
)
def test_what_a_leaf_may_depend_on(function, is_derived: bool) -> None:
    def apply(p, h, x):
        v = 0.5 * h[0] + p * x + 0.1 * h[1]
        return (v, function(p, h, x, v)), v

    assert derived(apply, SHAPE, (SHAPE, SHAPE), SHAPE) == ({"1"} if is_derived else set())


def test_a_carry_that_no_step_could_have_left_keeps_its_values() -> None:
    """The first carry is the user's: a spike without the potential for it is one, in values and in the gradient."""
    p = problem("alif")
    v, a, _ = p.carry
    carry = (v, a, jnp.ones_like(v))
    learner, loss_fn = deep_eprop(p.network, exact=True), p.loss_fn
    state = learner.init(p.params, carry, p.xs[0])
    (loss, _), grads = learner.value_and_grad(loss_fn, segment_length=3)(p.params, state, p.xs, p.targets)

    def bptt(params):
        apply = jax.vmap(p.network.apply, in_axes=(None, 0, 0))

        def body(carry, inputs):
            carry, y = apply(params, carry, inputs[0])
            return carry, loss_fn(y, inputs[1])

        return jax.lax.scan(body, carry, (p.xs, p.targets))[1].sum()

    wanted_loss, wanted = jax.value_and_grad(bptt)(p.params)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-12)
    assert_same_gradient(grads, wanted, 1e-9)


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(
    ("function", "first"),
    [
        (jnp.sqrt, 0.0),
        (lambda v: v / jnp.maximum(jnp.abs(v), jnp.finfo(v.dtype).tiny), 0.0),
        (lambda v: v / (0.5 + jnp.abs(v)).astype(jnp.int32), 0.0),
        (lambda v: 1 / (1 + jnp.exp(-v)), -1e3),
        (jax.nn.silu, -jnp.inf),
        (lambda v: 0.1 * v * v, -jnp.inf),
    ],
)
def test_a_pole_at_the_first_carry_is_met_by_nobody(function, first: float) -> None:
    """Z has no finite slope at the first carry, and no step takes one there: the gradient stays finite."""

    def apply(p, h, x):
        v = jnp.maximum(h[0], jnp.exp(p * x) + 0.1 * h[1])
        s = function(v)
        return (v, s), jnp.tanh(v + s)

    def loss_fn(y, target):
        return jnp.sum((y - target) ** 2)

    cell = Cell(lambda key, x: (jnp.full(3, 0.3), (jnp.full_like(x, first), jnp.zeros_like(x))), apply)
    xs, targets = np.random.default_rng(0).normal(size=(2, 7, 2, 3))
    params, carry = cell.init(jax.random.key(0), jnp.asarray(xs[0]))
    wanted = bptt(cell, loss_fn)(params, carry, xs, targets)[-1]
    assert bool(jnp.isfinite(wanted).all())
    for exact in (True, False):  # units are on their own: both are BPTT
        learner = deep_eprop(cell, exact=exact)
        _, grads = learner.value_and_grad(loss_fn, segment_length=3)(
            params, learner.init(params, carry, xs[0]), xs, targets
        )
        assert_same_gradient(grads, wanted, 1e-9)


@pytest.mark.mixed_promotion
def test_one_slot_less_in_every_trace() -> None:
    x = jnp.ones((2, 4))
    for cell, slots in ((lif(3), 1), (alif(3), 2)):
        learner = deep_eprop(cell)
        params, carry = learner.network.init(jax.random.key(0), x)
        state = learner.init(params, carry, x)
        assert {trace.shape[1] for trace in jax.tree.leaves(state.traces)} == {slots}
        assert jax.tree.structure(state.carry) == jax.tree.structure(carry)


@pytest.mark.mixed_promotion
def test_in_a_stack_of_identical_layers() -> None:
    network = stack(stack(lif(3), depth=2))
    draw = np.random.default_rng(0)
    xs, targets = draw.normal(size=(7, 2, 3)) * 2, draw.normal(size=(7, 2, 3))
    params, carry = network.init(jax.random.key(0), jnp.asarray(xs[0]))
    params, carry = jax.tree.map(lambda leaf: 2 * leaf.astype(jnp.float64), (params, carry))

    def loss_fn(y, target):
        return jnp.sum((y - target) ** 2)

    learner = deep_eprop(network, exact=True)
    state = learner.init(params, carry, xs[0])
    _, grads = learner.value_and_grad(loss_fn, segment_length=3)(params, state, xs, targets)
    wanted = bptt(network, loss_fn)(params, carry, xs, targets)[-1]
    assert all(jnp.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(wanted))
    assert_same_gradient(grads, wanted, 1e-9)
