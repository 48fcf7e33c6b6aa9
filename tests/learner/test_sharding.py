"""A batch over several devices: the gradient of one device, by one sum, and nothing sent inside the loop over time."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepeprop_jax import Cell, carry_basis, deep_eprop, error_meter, hoisted_bptt, stack, with_basis
from deepeprop_jax.analysis.per_example import is_per_example
from tests.gradients import SAME, assert_same_gradient
from tests.zoo import problem

pytestmark = pytest.mark.as_users

COLLECTIVE = r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("


def mesh_of(kind: AxisType):
    return jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(kind,))


def collectives(program: str) -> dict[str, list[str]]:
    """Of a compiled program: what devices send each other, outside of loops ("ENTRY") and in each other computation."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        name = ("ENTRY" if head.group(1) else head.group(2)) if head else name
        sent = re.search(COLLECTIVE, line)
        if sent:
            found.setdefault(name, []).append(sent.group(1))
    return found


def losses(y, target):
    """One per example."""
    return target["weight"] * sum(
        jnp.sum((a - b) ** 2, axis=tuple(range(1, a.ndim)))
        for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(target["value"]), strict=True)
    )


def placed(mesh, p, batch_in_time):
    """Arguments, the batch over the mesh, and the types that shard_map is told."""
    batch, everywhere = PartitionSpec("data"), PartitionSpec()
    targets = {"value": jax.tree.map(lambda _: batch_in_time, p.targets["value"]), "weight": everywhere}
    specs = (everywhere, batch, batch_in_time, targets, batch_in_time)
    resets = jnp.zeros((6, p.xs.shape[1]), bool).at[4, 1].set(True)
    arguments = (p.params, p.carry, p.xs, p.targets, resets)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    moved = [
        jax.tree.map(lambda w, part: jax.tree.map(lambda leaf: jax.device_put(leaf, w), part), w, a)
        for w, a in zip(where, arguments, strict=True)
    ]
    return arguments, moved, specs


def online(p, loss_fn, length, **options):
    """Gradient of a sequence, with a reset; for ``length`` "stream" by steps, for "bptt" by ``hoisted_bptt``."""
    learner = deep_eprop(p.network, **options)

    def gradient(params, carry, xs, targets, resets):
        if length == "bptt":
            return hoisted_bptt(p.network)(loss_fn)(params, carry, xs, targets, resets)[1]
        state = learner.init(params, carry, xs[0])
        if length != "stream":
            run = learner.value_and_grad(loss_fn, segment_length=length)
            return run(params, state, xs, targets, resets)[1]

        def body(state, now):
            x, target, flags = now
            state, y = learner.step(params, learner.reset(state, flags), x)
            return state, learner.gradient(params, state, jax.grad(lambda y: loss_fn(y, target).sum())(y))

        return jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.scan(body, state, (xs, targets, resets))[1])

    return gradient


MODES = [
    ("stack_3", {}, 2),
    ("stack_3", {"exact": True}, 1),
    pytest.param("stack_3", {"hops": 0, "rank": 2}, 2, marks=pytest.mark.slow),
    pytest.param("stack_3", {"hops": 0}, "stream", marks=pytest.mark.slow),
    ("stack_3", {}, "bptt"),
    pytest.param("depth_4_between", {}, 2, marks=pytest.mark.slow),
    ("stack_3_spiking", {}, "stream"),
    pytest.param("stack_3", {"carry_rank": 2}, 2, marks=pytest.mark.slow),
    pytest.param("stack_3", {"carry_rank": 2, "project_every": 2}, "stream", marks=pytest.mark.slow),
]


def check_devices(name: str, options: dict, length) -> None:
    p = problem(name, steps=6, batch=8)
    for loss_fn in (losses, p.loss_fn):
        gradient = online(p, loss_fn, length, **options)
        explicit, auto = mesh_of(AxisType.Explicit), mesh_of(AxisType.Auto)
        arguments, _, specs = placed(auto, p, PartitionSpec(None, "data"))
        needed = jax.jit(gradient)(*arguments)
        ways = {}
        if loss_fn is losses:  # a scalar loss of a part of the batch is another one, unless it is a sum
            mapped = jax.shard_map(gradient, mesh=auto, in_specs=specs, out_specs=PartitionSpec())
            ways["shard_map"] = jax.jit(mapped), arguments
        ways["explicit axes"] = jax.jit(gradient), placed(explicit, p, PartitionSpec(None, "data"))[1]
        for way, (function, given) in ways.items():
            where = f"{name}, {options}, {length}, {way}"
            compiled = function.lower(*given).compile()
            # The same up to the order of a sum over devices.
            assert_same_gradient(jax.device_get(compiled(*given)), needed, SAME, where)
            sent = collectives(compiled.as_text())
            if length == "stream":  # a gradient at every step is a sum at every step
                assert {kind for kinds in sent.values() for kind in kinds} == {"all-reduce"}, (where, sent)
            elif loss_fn is losses:
                assert list(sent) == ["ENTRY"] and set(sent["ENTRY"]) == {"all-reduce"}, (where, sent)
            else:
                assert {kind for kinds in sent.values() for kind in kinds} <= {"all-reduce", "all-gather"}, (
                    where,
                    sent,
                )


@pytest.mark.parametrize(("name", "options", "length"), MODES)
def test_a_split_batch_gives_the_gradient_of_one_device(name, options, length):
    check_devices(name, options, length)


@pytest.mark.slow
def test_eight_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not slow", __file__]
    subprocess.run(command, env=os.environ | {"TEST_DEVICES": "8"}, check=True)


@pytest.mark.parametrize("jitted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_and_aux_and_the_way_of_eager_calls(jitted):
    """With and without jit, with aux, and without a mesh in sight: each as on one device, and the state stays split."""
    maybe_jit = jax.jit if jitted else lambda function: function
    p = problem("stack_2", steps=6, batch=8)
    learner = deep_eprop(p.network)
    (params, carry, xs, targets, _), moved, _ = placed(mesh_of(AxisType.Explicit), p, PartitionSpec(None, "data"))
    found = []
    for params, carry, xs, targets in ((params, carry, xs, targets), moved[:4]):  # noqa: B020
        state = maybe_jit(learner.init)(params, carry, xs[0])
        run = learner.value_and_grad(lambda y, t: (p.loss_fn(y, t), {"y": y, "big": y.max() > 1}), has_aux=True)
        found.append(jax.device_get(maybe_jit(run)(params, state, xs, targets)))
        state, _ = maybe_jit(learner.step)(params, state, xs[0])
        assert jax.typeof(state.carry[0]).sharding.spec in (PartitionSpec("data", None), PartitionSpec(None, None))
    (((loss, aux), _), grads), (((needed, needed_aux), _), needed_grads) = found[1], found[0]
    assert jnp.allclose(loss, needed, rtol=SAME)
    assert jnp.array_equal(aux["big"], needed_aux["big"])
    assert_same_gradient((grads, aux["y"]), (needed_grads, needed_aux["y"]), SAME)


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
def test_a_basis_and_a_meter_of_a_split_batch_are_those_of_one_device(jitted):
    p, key = problem("stack_2", steps=4, batch=8), jax.random.key(0)
    learner = deep_eprop(p.network, carry_rank=2)
    of_basis, of_meter = carry_basis(learner, p.loss_fn, segment_length=2), error_meter(learner, p.loss_fn)

    def learn(params, carry, xs, targets):
        basis = of_basis.init(key, params, carry, xs[0])
        meter = of_meter.init(key, params, carry, xs[0])
        state = learner.init(params, carry, xs[0])
        seen = of_basis.observe(of_basis.begin(basis, key, carry), params, state, xs, targets)
        basis = of_basis.choose(basis, seen)
        run = learner.value_and_grad(p.loss_fn, segment_length=2)
        (_, after), grads = run(params, with_basis(state, basis), xs, targets)
        meter = of_meter.begin(of_meter.update(meter, params, state, xs, targets, grads), params, carry, xs[0])
        return basis, grads, of_meter.update(meter, params, after, xs, targets, grads).errors

    (*arguments, _), (*moved, _), _ = placed(mesh_of(AxisType.Explicit), p, PartitionSpec(None, "data"))
    needed = jax.jit(learn)(*arguments)
    assert_same_gradient(jax.device_get((jax.jit(learn) if jitted else learn)(*moved)), needed, 1e-9)


FORWARD = Cell(None, lambda m, h, x: ((), jnp.tanh(m @ x)))
RECURRENT = Cell(None, lambda w, h, x: (jnp.tanh(w @ h + x),) * 2)
WITHOUT_CARRY = {
    "a deep node below": (stack(stack(FORWARD, depth=2), RECURRENT), [(2, 3, 3), (3, 3)], ((), jnp.zeros((4, 3)))),
    "a deep node above": (stack(RECURRENT, stack(FORWARD, depth=2)), [(3, 3), (2, 3, 3)], (jnp.zeros((4, 3)), ())),
    "all nodes": (stack(FORWARD, FORWARD), [(3, 3), (3, 3)], ((), ())),
}


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", WITHOUT_CARRY)
def test_nodes_without_carry_vary_as_their_inputs_do(name, length):
    """Under shard_map sums and the way up start from zeros, which have to vary over the mesh where no carry does."""
    network, shapes, carry = WITHOUT_CARRY[name]
    draw = np.random.default_rng(0).normal
    params, xs = tuple(jnp.asarray(draw(size=shape)) for shape in shapes), jnp.asarray(draw(size=(5, 4, 3)))

    def gradient(params, carry, xs):
        learner = deep_eprop(network, exact=True)
        run = learner.value_and_grad(lambda y, target: jnp.sum(y**2), segment_length=length)
        return run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(5))[1]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data"))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    assert_same_gradient(jax.jit(mapped)(params, carry, xs), jax.jit(gradient)(params, carry, xs), SAME)


def test_other_axes_than_the_batch_may_not_be_split():
    p = problem("stack_2", steps=6, batch=8)
    mesh = mesh_of(AxisType.Explicit)
    x = jax.device_put(jnp.ones((8, 8), p.xs.dtype), NamedSharding(mesh, PartitionSpec(None, "data")))
    with pytest.raises(ValueError, match="only the batch axis may be split"):
        deep_eprop(p.network).init(p.params, p.carry, x)


WHOLE_BATCH = {
    "centred": lambda y, target: jnp.sum((y - y.mean(axis=0, keepdims=True)) ** 2, axis=-1),
    "the batch, without a derivative": lambda y, target: jnp.sum(y**2, axis=-1) * jax.lax.stop_gradient(y.mean()) ** 2,
    "rank": lambda y, target: jnp.sum(y**2, axis=-1) * jnp.argsort(y[:, 0]).astype(y.dtype),
    "number of examples": lambda y, target: jnp.sum(y**2, axis=-1) / y.shape[0],
    "sum of ones": lambda y, target: jnp.sum(y**2, axis=-1) / jnp.ones(y.shape[0]).sum(),
}


def test_losses_per_example_that_need_the_whole_batch_get_it():
    p = problem("stack_2", steps=4, batch=8)
    learner, mesh = deep_eprop(p.network), mesh_of(AxisType.Explicit)
    where = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",), (None, "data"))]
    split = [jax.device_put(part, w) for part, w in zip((p.params, p.carry, p.xs), where, strict=True)]

    valid = jnp.ones((4, 8), bool).at[(1, 3), (2, 7)].set(False)

    def run(params, carry, xs):
        state = learner.init(params, carry, xs[0])
        calls = [learner.value_and_grad(loss_fn, segment_length=2) for loss_fn in WHOLE_BATCH.values()]
        return [
            (loss, grads) for (loss, _), grads in (call(params, state, xs, jnp.zeros(4), valid=valid) for call in calls)
        ]

    needed, seen = jax.jit(run)(p.params, p.carry, p.xs), jax.jit(run)(*split)
    for name, (loss, grads), (loss_of_one, grads_of_one) in zip(WHOLE_BATCH, seen, needed, strict=True):
        assert jnp.allclose(loss, loss_of_one, rtol=SAME), name
        assert_same_gradient(jax.device_get(grads), grads_of_one, SAME, name)


@pytest.mark.parametrize(
    ("loss_fn", "own", "wanted"),
    [
        *((loss_fn, (False,), False) for loss_fn in WHOLE_BATCH.values()),
        (lambda y, t: jnp.sum((jnp.tanh(y) - t) ** 2, axis=-1), (False,), True),
        (lambda y, t: t * jnp.log(jnp.abs(y).max(axis=-1)), (False,), True),
        (lambda y, t: -jnp.log(jnp.exp(y)[:, 0] / jnp.exp(y).sum(axis=-1)), (False,), True),
        (lambda y, t: jnp.sum(y**2), (False,), False),
    ],
)
def test_what_needs_no_other_example(loss_fn, own, wanted):
    y, target = jax.ShapeDtypeStruct((6, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    assert is_per_example(loss_fn, y, target, own, 3) == wanted


def test_targets_of_the_whole_batch_are_not_those_of_an_example():
    y, target = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 3), (6,)))
    own, all_of_them = (lambda y, t: y[:, 0] * t), (lambda y, t: y[:, 0] * t.mean())
    assert is_per_example(own, y, target, [True], 2)
    assert not is_per_example(all_of_them, y, target, [True], 2)


def test_numbers_as_params_over_a_mesh():
    mesh = mesh_of(AxisType.Explicit)
    learner = deep_eprop(lambda p, h, x: (jnp.tanh(p["w"] * h + x),) * 2)
    zeros = jax.device_put(jnp.zeros((8, 3)), NamedSharding(mesh, PartitionSpec("data")))
    state = learner.init({"w": 0.5}, zeros, zeros)
    _, y = learner.step({"w": 0.5}, state, zeros)
    assert y.shape == (8, 3)
