"""``data_parallel``: the gradient of one device by one sum a call, nothing sent in the loop, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepeprop_jax import data_parallel, deep_eprop, random_feedback
from deepeprop_jax.cells import leaky_rnn
from deepeprop_jax.learner.one_sum import summed
from deepeprop_jax.rules import rflo, uoro
from tests.gradients import SAME, assert_same_gradient
from tests.learner.test_sharding import collectives, losses
from tests.zoo import problem

STEPS, BATCH = 6, 8


def mesh_of(kind: AxisType = AxisType.Auto):
    return jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(kind,))


def setup(name: str):
    """A problem with resets and steps that are not valid, on examples of different devices."""
    p = problem(name, steps=STEPS, batch=BATCH)
    resets = jnp.zeros((STEPS, BATCH), bool).at[(4, 2), (1, 7)].set(True)
    valid = jnp.ones((STEPS, BATCH), bool).at[(3, 5, 0), (2, 2, 6)].set(False)
    return p, (p.params, p.carry, p.xs, p.targets, resets, valid)


def sequence(learner, signals=None, **options):
    """Loss, gradient and the state's carry and traces after two pieces of a sequence."""

    def run(params, carry, xs, targets, resets, valid):
        state = learner.init(params, carry, xs[0])
        over = learner.value_and_grad(losses, segment_length=2, signals=signals, **options)
        (loss, state), grads = over(params, state, xs, targets, resets, valid)
        return loss, grads, state.carry, state.traces

    return run


def check(name: str, kind: AxisType, **options) -> None:
    p, arguments = setup(name)
    learner, given = deep_eprop(p.network, **options), None
    if "signals" in options:
        given = random_feedback(jax.random.key(0), p.network, p.params, p.carry, p.xs[0], nodes=options["signals"])
    parallel = data_parallel(learner, mesh_of(kind))
    compiled = jax.jit(sequence(parallel, given)).lower(*arguments).compile()
    assert_same_gradient(
        jax.device_get(compiled(*arguments)), jax.jit(sequence(learner, given))(*arguments), SAME, f"{name} {options}"
    )
    # One collective outside, none in a loop.
    assert collectives(compiled.as_text()) == {"ENTRY": ["all-reduce"]}


QUICK = [
    ("stack_2", AxisType.Auto, {}),
    ("stack_3", AxisType.Explicit, {"exact": True}),
    ("stack_2", AxisType.Auto, {"carry_rank": 2}),
    ("stack_2", AxisType.Auto, {"signals": ("0",)}),
]
WIDE = [
    ("stack_3", AxisType.Auto, {}),
    ("stack_3", AxisType.Auto, {"hops": 0, "rank": 2}),
    ("stack_3", AxisType.Explicit, {"carry_rank": 2, "own_traces": True}),
    ("stack_3_spiking", AxisType.Auto, {}),
    ("depth_4_between", AxisType.Auto, {}),
    ("graph_diamond", AxisType.Explicit, {}),
    ("stack_3", AxisType.Auto, {"signals": ("0", "1")}),
]


@pytest.mark.parametrize(
    ("name", "kind", "options"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE)]
)
def test_one_sum_gives_the_gradient_of_one_device(name, kind, options):
    check(name, kind, **options)


@pytest.mark.parametrize("make", [deep_eprop, pytest.param(rflo, marks=pytest.mark.slow)])
def test_a_stream_with_updates_and_resets(make):
    """By single steps, each with its gradient, which is one sum; all examples of a device reset at once."""
    p, (params, carry, xs, targets, _, _) = setup("stack_2")
    network = p.network if make is deep_eprop else leaky_rnn(3)
    if make is rflo:
        made = network.init(jax.random.key(0), xs[0].astype(jnp.float32))
        params, carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), made)
        targets = {"value": jnp.zeros((STEPS, BATCH, 3)), "weight": targets["weight"]}
    learner = make(network)
    here = jnp.arange(BATCH) < BATCH // len(jax.devices())

    def stream(learner):
        def run(params, carry, xs, targets):
            def body(now, given):
                (params, state), (x, target) = now, given
                state, y = learner.step(params, state, x)
                dy = jax.grad(lambda y: losses(y, target).sum())(y)
                grads = learner.gradient(params, state, dy)
                reset = learner.reset(state, here)
                part = learner.gradient(params, reset, dy)
                each = learner.gradient(params, reset, dy, per_example=True) if make is deep_eprop else ()
                return (jax.tree.map(lambda a, b: a - 0.05 * b, params, grads), reset), (grads, part, each)

            state = learner.init(params, carry, xs[0])
            return jax.lax.scan(body, (params, state), (xs, targets))[1]

        return jax.jit(run)

    compiled = stream(data_parallel(learner, mesh_of())).lower(params, carry, xs, targets).compile()
    needed = stream(learner)(params, carry, xs, targets)
    assert_same_gradient(jax.device_get(compiled(params, carry, xs, targets)), needed, SAME)
    sent = [kind for kinds in collectives(compiled.as_text()).values() for kind in kinds]
    assert set(sent) == {"all-reduce"}, sent
    assert len(sent) <= 3, sent  # one per call of gradient, of which there are two or three a step


@pytest.mark.parametrize("jitted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_aux_and_targets_that_are_shared(jitted):
    """With and without jit; aux comes back per example; a target of another length belongs to no example."""
    p, (params, carry, xs, _, _, _) = setup("stack_2")
    learner = deep_eprop(p.network)
    targets = {"own": p.targets["value"], "all": jnp.ones((STEPS, 3))}

    def loss_fn(y, target):
        loss = ((y - target["own"]) ** 2 * target["all"].sum()).sum(axis=1)
        return loss, {"y": y, "big": y.max(axis=1) > 0}

    parallel, found = data_parallel(learner, mesh_of()), []
    for made in (learner, parallel):
        maybe_jit = jax.jit if jitted else lambda function: function
        state = maybe_jit(made.init)(params, carry, xs[0])
        run = maybe_jit(made.value_and_grad(loss_fn, has_aux=True))
        ((loss, aux), state), grads = run(params, state, xs, targets)
        found.append(jax.device_get((loss, aux["y"], grads, state.carry, aux["big"])))
    assert_same_gradient(found[1][:-1], found[0][:-1], SAME)
    assert jnp.array_equal(found[0][-1], found[1][-1])
    with pytest.raises(ValueError, match="No step is pending"):
        parallel.gradient(params, state, p.targets["value"][0])


def test_arrays_that_are_split_already_stay_where_they_are():
    p, (params, carry, xs, _, _, _) = setup("stack_2")
    mesh = mesh_of()
    held = NamedSharding(mesh, PartitionSpec("data"))
    learner = data_parallel(deep_eprop(p.network), mesh)
    state = jax.jit(learner.init)(params, jax.device_put(carry, held), jax.device_put(xs[0], held))
    state, y = jax.jit(learner.step, donate_argnums=1)(params, state, jax.device_put(xs[1], held))
    for leaf in jax.tree.leaves((state.carry, state.traces, y)):
        assert leaf.sharding.is_equivalent_to(held, leaf.ndim)
        assert leaf.addressable_shards[0].data.shape[0] == BATCH // len(jax.devices())


def test_what_is_refused():
    p, (params, carry, xs, targets, _, _) = setup("stack_2")
    learner, mesh = deep_eprop(p.network), mesh_of()
    parallel = data_parallel(learner, mesh)
    devices = len(jax.devices())
    odd = jax.tree.map(lambda leaf: leaf[: BATCH - 1], carry)
    with pytest.raises(ValueError, match=f"batch of 7 examples does not divide over {devices} devices"):
        parallel.init(params, odd, xs[0, :7])
    state = jax.eval_shape(parallel.init, params, carry, xs[0])

    def run(loss_fn, targets=targets, **options):
        return jax.eval_shape(parallel.value_and_grad(loss_fn, **options), params, state, xs, targets)

    with pytest.raises(ValueError, match="one number for all 8 examples"):
        run(lambda y, target: losses(y, target).mean())
    with pytest.raises(ValueError, match="may need other examples"):
        run(lambda y, target: losses(y - y.mean(axis=0, keepdims=True), target))
    with pytest.raises(ValueError, match=r"one loss per example, \(8,\); seen \(8, 2\)"):
        run(lambda y, target: (y - target["value"]) ** 2)
    with pytest.raises(ValueError, match="auxiliary output at 'mean' has shape"):
        run(lambda y, target: (losses(y, target), {"mean": y.mean()}), has_aux=True)
    with pytest.raises(ValueError, match="losses of one step; seen window"):
        run(lambda ys, target: jnp.sum(ys**2, axis=-1), window=2)
    with pytest.raises(ValueError, match=r"axis must name axes of the mesh.*\('data',\).*'model'"):
        data_parallel(learner, mesh, axis="model")
    with pytest.raises(TypeError, match="needs a learner"):
        data_parallel(p.network, mesh)
    with pytest.raises(TypeError, match=r"jax\.make_mesh"):
        data_parallel(learner, jax.devices())
    with pytest.raises(ValueError, match="draws at random"):
        drawn = leaky_rnn(3)
        x = xs[0].astype(jnp.float32)
        data_parallel(uoro(drawn), mesh).init(*drawn.init(jax.random.key(0), x), x)
    signalled = data_parallel(deep_eprop(p.network, signals=("0",)), mesh)
    with pytest.raises(ValueError, match=r"signals\['0'\]"):
        wrong = {"0": lambda dy, target: jnp.ones((BATCH, 3)) * dy.mean()}
        signalled_state = jax.eval_shape(signalled.init, params, carry, xs[0])
        jax.eval_shape(signalled.value_and_grad(losses, signals=wrong), params, signalled_state, xs, targets)


def small():
    network, x = leaky_rnn(3), jnp.ones((BATCH, 2), jnp.float32)
    return (network, *network.init(jax.random.key(0), x), x)


def test_over_explicit_axes_a_device_of_reset_examples_adds_nothing():
    """Its gradient was NaN, and so was the sum."""
    network, params, carry, x = small()
    learner, here = deep_eprop(network), jnp.arange(BATCH) < BATCH // len(jax.devices())

    def gradients(params, carry, x, here):
        state, y = learner.step(params, learner.init(params, carry, x), x)
        state = learner.reset(state, here)
        dy = jax.tree.map(jnp.ones_like, y)
        each = learner.gradient(params, state, dy, per_example=True)
        return learner.gradient(params, state, dy), jax.tree.map(lambda leaf: leaf.sum(0), each)

    batch = NamedSharding(mesh_of(AxisType.Explicit), PartitionSpec("data"))
    split = jax.tree.map(lambda leaf: jax.device_put(leaf, batch), (carry, x, here))
    needed = jax.jit(gradients)(params, carry, x, here)
    assert_same_gradient(jax.device_get(jax.jit(gradients)(params, *split)), needed, 1e-6)
    nothing, zeros = jax.jit(gradients)(params, *split[:2], jax.device_put(jnp.ones(BATCH, bool), batch))
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(nothing))
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))


def test_batch_first_and_lengths():
    network, params, carry, x = small()
    xs = jax.random.normal(jax.random.key(1), (BATCH, 5, 2), jnp.float32)
    lengths = jnp.arange(BATCH) % 5 + 1

    def run(learner):
        over = learner.value_and_grad(lambda y, target: target * (y**2).sum(axis=-1), time_major=False)
        (loss, _), grads = jax.jit(over)(
            params, learner.init(params, carry, x), xs, jnp.ones((BATCH, 5), jnp.float32), seq_lengths=lengths
        )
        return loss, grads

    learner = deep_eprop(network)
    assert_same_gradient(jax.device_get(run(data_parallel(learner, mesh_of()))), run(learner), 1e-6)


def test_it_hashes():
    learner = data_parallel(deep_eprop(leaky_rnn(3)), mesh_of())
    assert hash(learner) == hash(learner._replace())


def test_one_sum_of_many_dtypes():
    mesh = mesh_of()
    tree = {
        "half": jnp.full(3, 0.5, jnp.bfloat16),
        "complex": jnp.full((2, 2), 1 + 2j, jnp.complex64),
        "wide": jnp.arange(3.0, dtype=jnp.float64),
        "count": jnp.arange(2),
        "empty": jnp.zeros((0, 2), jnp.float32),
    }
    over = jax.shard_map(
        lambda tree: summed(tree, ("data",)),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    compiled = jax.jit(over).lower(tree).compile()
    n = len(jax.devices())
    needed = {
        name: leaf if name in ("count", "empty") else leaf * jnp.asarray(n, leaf.dtype) for name, leaf in tree.items()
    }
    assert_same_gradient(jax.device_get(compiled(tree)), needed, SAME)
    assert collectives(compiled.as_text()) == {"ENTRY": ["all-reduce"]}
