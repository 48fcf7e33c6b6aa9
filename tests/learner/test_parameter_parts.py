"""Traces split by parameters over an axis of a mesh: the gradient of one device, nothing sent in time, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from deepeprop_jax import data_parallel, deep_eprop, random_feedback, stack
from deepeprop_jax.cells import leaky_readout, leaky_rnn, lif
from deepeprop_jax.jaxpr.merged import NotAlike, merged
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.rules import rflo
from tests.gradients import SAME, assert_same_gradient
from tests.learner.test_data_parallel import BATCH, setup
from tests.learner.test_sharding import collectives, losses


def mesh_of(kind: AxisType = AxisType.Auto):
    """As many parts as fit, at most four, and the batch over the rest."""
    parts = min(4, len(jax.devices()))
    return jax.make_mesh((len(jax.devices()) // parts, parts), ("data", "unit"), axis_types=(kind,) * 2)


def device_bytes(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def whole_bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def sequence(learner, signals=None):
    def run(params, carry, xs, targets, resets, valid):
        state = learner.init(params, carry, xs[0])
        over = learner.value_and_grad(losses, segment_length=2, signals=signals)
        (loss, state), grads = over(params, state, xs, targets, resets, valid)
        return (loss, grads, state.carry), state

    return run


def check(learner, arguments, kind=AxisType.Auto, signals=None):
    """One all-reduce outside of loops; the same loss, gradient and carry; the states of both."""
    parallel = data_parallel(learner, mesh_of(kind), unit="unit")
    compiled = jax.jit(sequence(parallel, signals)).lower(*arguments).compile()
    seen, state = compiled(*arguments)
    needed, whole = jax.jit(sequence(learner, signals))(*arguments)
    assert_same_gradient(jax.device_get(seen), needed, SAME)
    assert collectives(compiled.as_text()) == {"ENTRY": ["all-reduce"]}
    return state, whole


def even(*cells):
    """A network whose leaves all divide by four, with its arguments."""
    network = stack(*cells)
    draw = jax.random.split(jax.random.key(0), 2)
    xs = jax.random.normal(draw[0], (6, BATCH, 4))
    params, carry = network.init(draw[1], xs[0].astype(jnp.float32))
    _, y = jax.eval_shape(jax.vmap(network.apply, (None, 0, 0)), params, carry, xs[0].astype(jnp.float32))
    params, carry = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, carry))
    value = jax.tree.map(lambda leaf: jnp.ones((6, *leaf.shape)), y)
    _, (*_, resets, valid) = setup("stack_2")
    return network, (params, carry, xs, {"value": value, "weight": jnp.arange(1.0, 7.0)}, resets, valid)


@pytest.mark.parametrize("options", [{}, pytest.param({"exact": True}, marks=pytest.mark.slow)])
def test_a_device_has_its_part_of_every_trace(options):
    network, arguments = even(leaky_rnn(8), leaky_rnn(4))
    learner, mesh = deep_eprop(network, **options), mesh_of()
    state, whole = check(learner, arguments)
    devices = len(jax.devices())
    assert device_bytes(state.traces) * devices == whole_bytes(whole.traces)
    held = learner.shardings(mesh, *arguments[:2], arguments[2][0], unit="unit")
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, state) is not None
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(held.state), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    params = jax.device_put(arguments[0], held.params)
    assert device_bytes(params) == whole_bytes(params)
    assert device_bytes(jax.device_put(arguments[2], held.xs)) * mesh.shape["data"] == arguments[2].nbytes


ZOO = [
    ("stack_3", AxisType.Explicit, {}),
    ("stack_3", AxisType.Auto, {"exact": True}),
    ("stack_3", AxisType.Auto, {"hops": 0}),
    ("stack_3", AxisType.Auto, {"carry_rank": 2, "own_traces": True}),
    ("stack_3", AxisType.Auto, {"signals": ("0", "1")}),
    ("stack_3_spiking", AxisType.Auto, {}),
    ("depth_4_between", AxisType.Auto, {}),
    ("graph_diamond", AxisType.Auto, {}),
    ("stack_2", AxisType.Auto, {"trainable": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)}),
]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [pytest.param(*case, marks=[] if case[2].keys() & {"carry_rank"} and False else pytest.mark.slow) for case in ZOO],
)
def test_leaves_that_do_not_all_divide(name, kind, options):
    p, arguments = setup(name)
    given = None
    if "signals" in options:
        given = random_feedback(jax.random.key(0), p.network, p.params, p.carry, p.xs[0], nodes=options["signals"])
    check(deep_eprop(p.network, **options), arguments, kind, given)


NETWORKS = {
    "factors": (lambda: even(leaky_rnn(8)), {}),
    "filtered": (lambda: even(lif(8), leaky_readout(4)), {}),
    "windows": (lambda: even(leaky_rnn(8)), {"carry_rank": 2, "project_every": 2}),
}


@pytest.mark.parametrize("name", ["factors", *(pytest.param(n, marks=pytest.mark.slow) for n in [*NETWORKS][1:])])
def test_a_stream_of_single_steps(name):
    """With updates and resets; what waits in the state for the next step is split too."""
    make, options = NETWORKS[name]
    network, (params, carry, xs, targets, resets, _) = make()
    learner = deep_eprop(network, **options)

    def stream(learner):
        def run(params, carry, xs, targets, resets):
            def body(now, given):
                (params, state), (x, target, where) = now, given
                state, y = learner.step(params, learner.reset(state, where), x)
                grads = learner.gradient(params, state, jax.grad(lambda y: losses(y, target).sum())(y))
                return (jax.tree.map(lambda a, b: a - 0.05 * b, params, grads), state), grads

            return jax.lax.scan(body, (params, learner.init(params, carry, xs[0])), (xs, targets, resets))[1]

        return jax.jit(run)

    parallel = data_parallel(learner, mesh_of(), unit="unit")
    compiled = stream(parallel).lower(params, carry, xs, targets, resets).compile()
    needed = stream(learner)(params, carry, xs, targets, resets)
    assert_same_gradient(jax.device_get(compiled(params, carry, xs, targets, resets)), needed, SAME)
    sent = [kind for kinds in collectives(compiled.as_text()).values() for kind in kinds]
    assert sent == ["all-reduce"], sent  # that of the gradient, once a step


def test_what_is_refused():
    network, (params, carry, xs, _, _, _) = even(leaky_rnn(8))
    mesh = mesh_of()
    for option in ({"rank": 2}, {"carry_rank": 2, "carry_factor": 1}):
        name = next(iter(option)) if "rank" in option else "carry_factor"
        with pytest.raises(ValueError, match=f"{name}=. keeps one product for all weights of a node"):
            data_parallel(deep_eprop(network, **option), mesh, unit="unit")
    learner = deep_eprop(network)
    with pytest.raises(ValueError, match="unit= needs a learner of deep_eprop"):
        data_parallel(rflo(network), mesh, unit="unit")
    with pytest.raises(ValueError, match="must name different axes"):
        data_parallel(learner, mesh, axis="unit", unit="unit")
    with pytest.raises(ValueError, match="unit must name axes of the mesh"):
        learner.shardings(mesh, params, carry, xs[0], unit="model")
    with pytest.raises(TypeError, match="Only a learner of deep_eprop tells shardings"):
        rflo(network).shardings(mesh, params, carry, xs[0])
    if mesh.shape["data"] > 1:
        with pytest.raises(ValueError, match="batch of 3 examples does not divide"):
            learner.shardings(mesh, params, carry[:3], xs[0][:3], unit="unit")
    parallel = data_parallel(learner, mesh, unit="unit")
    state = jax.eval_shape(parallel.init, params, carry, xs[0])
    with pytest.raises(ValueError, match="per_example gradients are whole"):
        jax.eval_shape(lambda: parallel.gradient(params, state, carry, per_example=True))


def test_programs_that_are_merged_do_as_each_does():
    """In slices, pads, constants and numbers, also inside of loops and branches; what differs otherwise is refused."""

    def program(place: int):
        def function(x, flag):
            part = jax.lax.slice_in_dim(x, place, place + 2) * (place + 1.5)
            wide = jax.lax.pad(part, 0.0, [(place, 3 - place, 0)]) + jax.lax.pad(x, 0.0, [(-place, place - 3, 0)]).sum()

            def body(sum, now):
                return sum + now[place], jax.lax.dynamic_slice_in_dim(sum, place, 1)

            end, stacked = jax.lax.scan(body, wide, jnp.outer(x, x), reverse=True)
            chosen = jax.lax.cond(flag, lambda y: y[place], lambda y: y.sum(), end)
            return end, stacked, chosen + jnp.asarray([3.0, 1.0, 4.0, 1.0])[place]

        return function

    x, flags = jnp.arange(5.0), (jnp.asarray(True), jnp.asarray(False))
    run = jax.jit(merged([trace(program(place), x, flags[0]) for place in range(4)]))
    for place in range(4):
        for flag in flags:
            assert_same_gradient(tuple(run(place, [x, flag])), program(place)(x, flag), SAME)
    with pytest.raises(NotAlike, match="while that differs inside"):
        loops = [lambda x, n=n: jax.lax.while_loop(lambda y: y.sum() < n, lambda y: y + 1, x) for n in (1.0, 2.0)]
        merged([trace(loop, x) for loop in loops])
    with pytest.raises(NotAlike, match="mul"):
        merged([trace(lambda x: x + x, x), trace(lambda x: x * x, x)])
    with pytest.raises(NotAlike, match="different places"):
        merged([trace(lambda x: x.sum() - x, x), trace(lambda x: x - x.sum(), x)])
    with pytest.raises(NotAlike, match="axes"):
        merged([trace(lambda x: x.sum(0), jnp.ones((2, 2))), trace(lambda x: x.sum(1), jnp.ones((2, 2)))])
