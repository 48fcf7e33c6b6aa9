"""Deep e-prop and hops equal the gradient of the network with stop_gradient put in by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import deep_eprop
from deepeprop_jax.reference import bptt, stop_gradient_oracle
from tests.gradients import FLOAT64, assert_same_gradient, relative_errors
from tests.learner.test_exact import ALL, SANDWICHES, library_gradient
from tests.zoo import cells, find, networks, problem


def check_equals_oracle(name: str, exact: bool, hops: int | None) -> None:
    every, last = problem(name), problem(name, loss="last")
    seen = library_gradient(every, exact=exact, hops=hops)
    if find(name).elementwise and not exact and hops is None:
        oracle = bptt(every.network, every.loss_fn)  # nothing is cut: deep e-prop is exact
    else:
        oracle = stop_gradient_oracle(every.network, every.loss_fn, every.pairs, localise=not exact, hops=hops)
    needed = jax.jit(oracle)
    for p, where in ((every, "loss at every step"), (last, "loss at the last step")):
        loss, grads = seen(p.targets)
        (loss_oracle, _), grads_oracle = needed(p.params, p.carry, p.xs, p.targets)
        assert jnp.allclose(loss, loss_oracle, rtol=FLOAT64)
        assert_same_gradient(grads, grads_oracle, FLOAT64, f"{name}, exact={exact}, hops={hops}, {where}")


NNX = [name for name in cells() if name.startswith("nnx")]  # the Linen cells' equations, and compared with BPTT
MOST = [param for param in ALL if param.values[0] not in NNX]


@pytest.mark.parametrize("name", [*MOST, *(pytest.param(name, marks=pytest.mark.slow) for name in NNX)])
def test_deep_eprop(name):
    """Where every carry is element-wise, at any depth, the gradient is that of BPTT."""
    check_equals_oracle(name, exact=False, hops=None)


def plan_of(name: str, **options):
    p = problem(name)
    return deep_eprop(p.network, **options).plan(p.params, p.carry, jax.tree.map(lambda leaf: leaf[0], p.xs))


FEW = [
    *("stack_2", "stack_3", "stack_5_recurrent", "tower_lru_3", "graph_diamond", "graph_two_outputs", "depth_4"),
    *("graph_skip", "graph_feed_forward", "graph_dict_input"),
]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in networks() if name not in FEW]


# Networks of one recurrent layer, and of two: so many hops are all that there are.
ONE_LAYER = {"stack_1", "stack_2", *(f"tower_{cell}_1" for cell in ("lru", "indrnn", "lif_no_lateral"))}
TWO_LAYERS = {"stack_3", "graph_skip", "graph_two_outputs", "graph_feed_forward", "graph_dict_input"}
ALL_HOPS = {0: ONE_LAYER, 1: ONE_LAYER | TWO_LAYERS | {name[:-1] + "2" for name in ONE_LAYER if "tower" in name}}


@pytest.mark.parametrize("name", [*FEW, *OTHERS])
@pytest.mark.parametrize("hops", [0, 1])
def test_deep_eprop_with_few_hops(name, hops):
    """No compilation where so many hops are all: then the plan is that of ``test_deep_eprop``."""
    few, every = ((plan.pairs, plan.transmitted, plan.bands) for plan in (plan_of(name, hops=hops), plan_of(name)))
    assert (few == every) == (name in ALL_HOPS[hops])
    if few != every:
        check_equals_oracle(name, exact=False, hops=hops)


SOME = [("graph_two_outputs", 0), ("graph_diamond", 1), ("depth_4", 0), ("depth_4_between", 1)]
MORE = [
    (name, hops) for name in ("stack_3", "stack_5_recurrent", "graph_diamond", "depth_4_between") for hops in (0, 1)
]


@pytest.mark.parametrize(
    ("name", "hops"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in SOME)]
)
def test_exact_with_few_hops(name, hops):
    check_equals_oracle(name, exact=True, hops=hops)


@pytest.mark.slow
@pytest.mark.parametrize("name", SANDWICHES)
@pytest.mark.parametrize("hops", [None, 0, 1])
def test_deep_eprop_between_recurrent_layers(name, hops):
    check_equals_oracle(name, exact=False, hops=hops)


@pytest.mark.parametrize("name", list(cells()))
def test_hops_change_nothing_in_a_single_node(name):
    """No compilation: the plan of a single node is the same for all hops."""
    p = problem(name)
    x = jax.tree.map(lambda leaf: leaf[0], p.xs)
    plans = [deep_eprop(p.network, hops=hops).plan(p.params, p.carry, x) for hops in (None, 0, 1)]
    for plan in plans:
        assert not plan.pairs
        assert not plan.transmitted
        assert [block.rows for block in plan.own[0]] == [block.rows for block in plans[0].own[0]]


def test_the_approximations_differ_from_bptt_and_from_each_other():
    """The checks above would prove nothing if e-prop, hops and BPTT agreed on these problems."""
    p = problem("depth_4")
    gradients = {
        (exact, hops): library_gradient(p, exact=exact, hops=hops)(p.targets)[1]
        for exact, hops in ((True, None), (False, None), (False, 1), (False, 0))
    }
    seen = list(gradients.values())
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert max(relative_errors(a, b).values()) > 1e-3
