"""Claims about compiled programs: constant memory, compile time, retracing, donation, export, sharding."""

from __future__ import annotations

import functools
import statistics
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export

from deepeprop_jax import deep_eprop, stack
from deepeprop_jax.cells import alif, lru
from deepeprop_jax.reference import bptt
from tests.gradients import assert_same_gradient

pytestmark = pytest.mark.as_users

NETWORKS = {
    "gru": lambda: stack(nn.GRUCell(features=6), nn.GRUCell(features=5), nn.Dense(2)),
    "lru": lambda: stack(lru(6, 6), lru(5, 5), nn.Dense(2)),
    "alif": lambda: stack(alif(6), alif(5), nn.Dense(2)),
}
MODES = [{"exact": True}, {"exact": False}, {"hops": 0}]


def mean_squared_error(y, target):
    return jnp.mean((y - target) ** 2)


def setup(network, steps=4, batch=3, features=4, dtype=jnp.float32, **options):
    learner = deep_eprop(network, **options)
    xs = jax.random.normal(jax.random.key(1), (steps, batch, features), dtype)
    params, carry = learner.network.init(jax.random.key(0), xs[0])
    return learner, params, carry, learner.init(params, carry, xs[0]), xs, jnp.zeros(steps, dtype)


def temporary_bytes(function, *args):
    """Temporary bytes of the compiled program, at XLA's own optimisation level."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", ["gru", "alif"])
def test_memory_does_not_grow_with_time(name, mode):
    found = {}
    for steps in (100, 10_000):
        learner, params, _, state, xs, targets = setup(NETWORKS[name](), steps, **mode)
        run = learner.value_and_grad(mean_squared_error, segment_length=20)
        flags = jnp.zeros(xs.shape[:2], bool)
        found[steps] = temporary_bytes(run, params, state, xs, targets, flags, ~flags)
        found[steps] += sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert found[10_000] < 1.01 * found[100]


@pytest.mark.parametrize(
    ("mode", "batch", "lengths"),
    [
        ({"exact": False}, 3, (256, 65_536)),
        ({"hops": 0}, 1, (256, 65_536)),
        ({"hops": 0}, 3, (193, 65_537)),
        ({"hops": 0, "rank": 2}, 3, (256, 65_536)),
    ],
    ids=str,
)
def test_memory_does_not_grow_with_time_in_segments_of_the_chosen_length(mode, batch, lengths):
    """One example, and a shorter last segment, too: XLA would copy a sequence that is reshaped before the loop."""
    found = []
    for steps in lengths:
        learner, params, _, state, xs, targets = setup(NETWORKS["gru"](), steps, batch=batch, **mode)
        found.append(temporary_bytes(learner.value_and_grad(mean_squared_error), params, state, xs, targets))
    assert found[1] < 1.01 * found[0]


def test_bptt_memory_does():
    """The contrast: what the claim above would read if it were false."""
    found = {}
    for steps in (100, 10_000):
        learner, params, carry, _, xs, targets = setup(NETWORKS["gru"](), steps)
        found[steps] = temporary_bytes(bptt(learner.network, mean_squared_error), params, carry, xs, targets)
    assert found[10_000] > 50 * found[100]


def compile_seconds(function, *args) -> float:
    """CPU seconds to lower and compile."""
    start = time.process_time()
    jax.jit(function).lower(*args).compile()
    return time.process_time() - start


def test_compile_time_against_bptt():
    """At most 4 times that of BPTT for 2 GRU layers, 5 times in segments with traces across nodes; medians of 3."""
    network = stack(nn.GRUCell(features=32), nn.GRUCell(features=32))
    modes = {"exact": {"exact": True}, "hops=0": {"hops": 0}, "all hops": {}, "all hops, step by step": {}}
    seconds: dict[str, list[float]] = {}
    for _ in range(3):
        for mode, options in modes.items():
            learner, params, carry, state, xs, targets = setup(network, steps=200, **options)
            run = learner.value_and_grad(mean_squared_error, segment_length=1 if "step" in mode else None)
            seconds.setdefault(mode, []).append(compile_seconds(run, params, state, xs, targets))
        rival = bptt(network, mean_squared_error)
        seconds.setdefault("bptt", []).append(compile_seconds(rival, params, carry, xs, targets))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    once = medians.pop("bptt")
    for mode, median in medians.items():
        assert median <= (5 if mode == "all hops" else 4) * once, (mode, medians, once)


def test_compile_time_does_not_grow_with_depth():
    seconds: dict[int, list[float]] = {4: [], 32: []}
    for _ in range(3):
        for depth, values in seconds.items():
            learner, params, _, state, xs, targets = setup(stack(nn.GRUCell(features=4), depth=depth))
            run = learner.value_and_grad(mean_squared_error)
            values.append(compile_seconds(run, params, state, xs, targets))
    assert statistics.median(seconds[32]) <= 1.5 * statistics.median(seconds[4]), seconds


def test_analysis_takes_less_than_two_seconds_a_node_once():
    network = stack(nn.LSTMCell(features=256), nn.OptimizedLSTMCell(features=256))
    learner = deep_eprop(network)
    x = jnp.zeros((2, 64), jnp.float32)
    params, carry = learner.network.init(jax.random.key(0), x)
    start = time.process_time()
    plan = learner.plan(params, carry, x)
    assert time.process_time() - start < 2 * len(plan.nodes)
    assert learner.plan(params, carry, x) is plan


def test_jit_does_not_retrace():
    learner, params, _, state, xs, targets = setup(NETWORKS["gru"]())
    run = jax.jit(chex.assert_max_traces(learner.value_and_grad(mean_squared_error), n=1))
    step = jax.jit(chex.assert_max_traces(learner.step, n=1))
    gradient = jax.jit(chex.assert_max_traces(learner.gradient, n=1))
    (_, state), _ = run(params, state, xs, targets)
    (_, state), _ = run(params, state, xs + 1, targets)
    for x in xs:
        state, y = step(params, state, x)
        gradient(params, state, jnp.ones_like(y))
    run(params, state, xs, targets)
    chex.clear_trace_counter()


def test_vmap_over_seeds():
    learner, _, _, _, xs, targets = setup(NETWORKS["gru"]())
    run = learner.value_and_grad(mean_squared_error)

    def of_seed(key):
        params, carry = learner.network.init(key, xs[0])
        (loss, state), grads = run(params, learner.init(params, carry, xs[0]), xs, targets)
        state, y = learner.step(params, state, xs[0])
        return loss, grads, learner.gradient(params, state, jnp.ones_like(y))

    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.jit(jax.vmap(of_seed))(keys)
    for i in range(3):
        one = jax.jit(of_seed)(keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), one, rtol=1e-4, atol=1e-6)


def test_scan_over_steps_equals_the_sequence():
    learner, params, _, state, xs, targets = setup(NETWORKS["gru"](), steps=6)

    def body(loop, inputs):
        state, total = loop
        x, target = inputs
        state, y = learner.step(params, state, x)
        grads = learner.gradient(params, state, jax.grad(mean_squared_error)(y, target))
        return (state, jax.tree.map(jnp.add, total, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (_, total), _ = jax.jit(lambda s: jax.lax.scan(body, (s, zeros), (xs, targets)))(state)
    _, whole = jax.jit(learner.value_and_grad(mean_squared_error))(params, state, xs, targets)
    chex.assert_trees_all_close(total, whole, rtol=1e-4, atol=1e-6)


def test_the_state_can_be_donated_and_takes_nothing_with_it():
    learner, params, carry, state, xs, targets = setup(NETWORKS["gru"]())
    run = jax.jit(learner.value_and_grad(mean_squared_error), donate_argnums=1)
    step = jax.jit(learner.step, donate_argnums=1)
    reset = jax.jit(learner.reset, donate_argnums=0)
    fresh = learner.init(params, carry, xs[0])
    for _ in range(2):
        (_, state), _ = run(params, state, xs, targets)
        for x in xs:
            state, _ = step(params, state, x)
            state = reset(state, jnp.array([True, False, False]))
    # Params, carry and inputs are still there, and a state made by init under jit is its own too.
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((params, carry, xs)))
    made = jax.jit(learner.init)(params, carry, xs[0])
    step(params, made, xs[0])
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((params, carry, xs)))
    chex.assert_trees_all_equal(
        run(params, fresh, xs, targets)[0][0], run(params, learner.init(params, carry, xs[0]), xs, targets)[0][0]
    )


@pytest.mark.parametrize("name", list(NETWORKS))
def test_export_for_cpu_cuda_and_tpu(name):
    learner, params, _, state, xs, targets = setup(NETWORKS[name]())
    dy = jnp.zeros((3, 2), jnp.float32)
    calls = {
        "value_and_grad": (learner.value_and_grad(mean_squared_error), (params, state, xs, targets)),
        "step": (learner.step, (params, state, xs[0])),
        "gradient": (learner.gradient, (params, state, dy)),
    }
    for function, args in calls.values():
        # States are pytrees that jax.export has no serialisation for, so their leaves are the arguments.
        leaves, structure = jax.tree.flatten(args)
        flat = jax.jit(lambda *leaves, f=function, s=structure: jax.tree.leaves(f(*jax.tree.unflatten(s, leaves))))
        exported = export.export(flat, platforms=["cpu", "cuda", "tpu"])(*leaves)
        assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.call(*leaves)[0].shape


def test_bfloat16_parameters_have_float32_traces():
    learner = deep_eprop(stack(nn.GRUCell(features=6, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), nn.Dense(2)))
    wide = deep_eprop(stack(nn.GRUCell(features=6), nn.Dense(2)))
    xs, targets = jax.random.normal(jax.random.key(1), (4, 3, 4), jnp.bfloat16), jnp.zeros(4, jnp.float32)
    # Orthogonal initialisers have no bfloat16 on a CPU, so the recurrent layer's numbers are cast.
    params, carry = wide.network.init(jax.random.key(0), xs[0].astype(jnp.float32))
    recurrent, carry = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params[0], carry))
    params = (recurrent, params[1])
    state = learner.init(params, carry, xs[0])
    (_, state), grads = jax.jit(learner.value_and_grad(mean_squared_error))(params, state, xs, targets)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.traces))
    assert [g.dtype for g in jax.tree.leaves(grads)] == [p.dtype for p in jax.tree.leaves(params)]
    # Close to the float32 network: bfloat16 has 8 bits.
    params, carry, xs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, carry, xs))
    state = wide.init(params, carry, xs[0])
    _, needed = wide.value_and_grad(mean_squared_error)(params, state, xs, targets)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(needed), strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.1 * jnp.linalg.norm(b) + 1e-3


def test_inference_is_apply_under_vmap_and_scan():
    learner, params, carry, state, xs, targets = setup(NETWORKS["gru"]())
    apply = jax.vmap(learner.network.apply, in_axes=(None, 0, 0))
    final, _ = jax.lax.scan(functools.partial(apply, params), carry, xs)
    (_, state), _ = jax.jit(learner.value_and_grad(mean_squared_error))(params, state, xs, targets)
    assert_same_gradient(state.carry, final, 1e-5)
