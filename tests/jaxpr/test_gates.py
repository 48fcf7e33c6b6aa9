"""A cell computed gate by gate is the same cell, with one array per gate and no more arithmetic than before."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax.jaxpr.batched import evaluate
from deepeprop_jax.jaxpr.gates import unconcatenate
from deepeprop_jax.jaxpr.program import (
    Equation,
    Variable,
    backward_slice,
    dependents,
    dot_axes,
    is_variable,
    shape_of,
)
from deepeprop_jax.jaxpr.rearrange import rearrange
from deepeprop_jax.jaxpr.trace import trace
from tests.gradients import SAME, assert_same_gradient
from tests.zoo import cells, problem

N, INPUTS = 6, 3
TAKES_APART = ("slice", "split", "unstack")


def run(program, *args):
    leaves = zip(program.inputs, jax.tree.leaves(args), strict=True)
    outputs = evaluate(program.equations, {**program.constants, **dict(leaves)}, program.outputs)
    return [jnp.asarray(x) if isinstance(x, (int, float)) else x for x in outputs]  # literals are Python numbers


def taken_apart(program, sources):
    """How many values that depend on ``sources`` are sliced or split."""
    varying = dependents(program.equations, sources)
    return sum(e.name in TAKES_APART and e.inputs[0] in varying for e in program.equations)


def multiply_adds(program):
    dots = [e for e in program.equations if e.name == "dot_general"]
    contracted = [[shape_of(e.inputs[0])[axis] for axis in dot_axes(e)[0].contract] for e in dots]
    return sum(int(np.prod([*shape_of(e.outputs[0]), *sizes])) for e, sizes in zip(dots, contracted, strict=True))


def assert_same_function(before, after, args):
    """Values, and the pullback of a random cotangent."""

    def pulled(program, args):
        floats, others = split(args)
        values, pullback, rest = jax.vjp(lambda floats: split(run(program, join(floats, others))), floats, has_aux=True)
        weights = [jnp.cos(1.0 + jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape) for v in values]
        return values, rest, pullback(weights)

    assert [v.aval for v in before.inputs] == [v.aval for v in after.inputs]
    seen, needed = jax.jit(lambda args: (pulled(after, args), pulled(before, args)))(jax.tree.leaves(args))
    assert_same_gradient(seen, needed, SAME)


def split(leaves):
    real = [x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in leaves]
    return [x for x in real if x is not None], [x if r is None else None for x, r in zip(leaves, real, strict=True)]


def join(floats, others):
    floats = iter(floats)
    return [next(floats) if x is None else x for x in others]


# --- cells: (params, h, x) -> gates, and how often a value that depends on h or x is still taken apart ----------------


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defjvp(lambda primals, tangents: (spike(*primals), tangents[0] / (1 + primals[0] ** 2)))


def wide(p, h, x, columns=4 * N):
    return h @ p["w"][:, :columns] + x @ p["u"][:, :columns] + p["b"][:columns]


def optimized_lstm(p, h, x):
    return nn.OptimizedLSTMCell(N).apply(p["lstm"], (jnp.sin(h), h), x)[0]


def concatenated_input(p, h, x):
    return jnp.split(jnp.concatenate([h, x]) @ jnp.concatenate([p["w"], p["u"]]) + p["b"], 4)


def unequal_sizes(p, h, x):
    return jnp.split(jax.nn.sigmoid(wide(p, h, x)), [1, 6, 13])


def nested_slices(p, h, x):
    z = wide(p, h, x)
    input_gate, forget_gate, output_gate = jnp.split(jax.nn.sigmoid(z[: 3 * N]), 3)
    return input_gate, forget_gate[1:], output_gate, jnp.tanh(z[3 * N :])


def gates_as_rows(p, h, x):
    i, f, g, o = wide(p, h, x).reshape(4, N)
    return i * jnp.tanh(g), f, o


def gates_as_axis(p, h, x):
    z = jnp.einsum("i,igo->go", h, p["w"].reshape(N, 4, N)) + jnp.einsum("goi,i->og", p["k"], x).T
    return [z[i] for i in range(4)]


def unstacked(p, h, x):
    z = jnp.stack([h @ p["w"][:, :N], x @ p["u"][:, :N]]) * p["b"][None, :N]
    return jnp.unstack(z + 1.0)


def transposed_weights(p, h, x):
    return jnp.split(p["w"].T @ h + p["u"].T @ x, 2)


def batched_heads(p, h, x):
    z = jnp.einsum("hi,hio->ho", h.reshape(2, 3), p["w"].reshape(2, 3, 4 * N)) + x.sum()
    return z[0], z[1]


def two_axes(p, h, x):
    z = jnp.tanh(h.reshape(2, 3) @ p["k"][:3, :, 0] + x[2])
    return z[:1, :2], z[1:, :2], z[:1, 2:], z[1:, 2:]


def scalars(p, h, x):
    z = jnp.clip(wide(p, h, x), -0.9, x[0] ** 2 + 1)
    z = jax.lax.select_n(x[1] > 0, z, 2.0 * z) ** 3 + jnp.where(z > 0.1, z, jax.lax.stop_gradient(z))
    return jnp.split(z, 4)


def dtypes(p, h, x):
    z = wide(p, h, x)
    counts = jnp.round(10 * z).astype(jnp.int32)
    return [*jnp.split(z.astype(jnp.float32).astype(jnp.float64), 2), *jnp.split(counts + 1, 3)]


def surrogate_per_gate(p, h, x):
    return [spike(part) for part in jnp.split(wide(p, h, x), 2)]


def surrogate_on_all(p, h, x):
    return jnp.split(spike(wide(p, h, x)), 2)


def interleaved(p, h, x):
    z = wide(p, h, x).reshape(2 * N, 2)
    return z[:, 0], z[:, 1]


def strided(p, h, x):
    z = wide(p, h, x)
    return z[::2], z[1::2]


def read_whole_too(p, h, x):
    z = wide(p, h, x)
    return z[:N], z[N:], z.sum()


def is_an_output_too(p, h, x):
    z = wide(p, h, x)
    return z, z[:N], h, h, h[:2]


def overlapping(p, h, x):
    z = wide(p, h, x)
    return z[: 2 * N], z[N:]


def unit_by_unit(p, h, x):
    z = wide(p, h, x)
    return [z[i] * z[i - 1] for i in range(4 * N)]


def several_results(p, h, x):
    values, positions = jax.lax.top_k(wide(p, h, x), N)
    return values[:2], values[2:], positions[:3]


def a_loop(p, h, x):
    end, all_ends = jax.lax.scan(lambda c, b: (jnp.tanh(c + b), c), wide(p, h, x), p["b"])
    return end[:N], end[N:], all_ends[0, :N]


def keys(p, h, x):
    several = jax.random.split(p["key"], 4)
    return several[:1], several[1:], h[0], jax.random.normal(several[1], (4,))[:2]


def reads_literals(p, h, x):
    ones = jnp.ones(4 * N)
    return jnp.split(ones * h[0], 4), ones[:2], 1.0, np.float32(2.0)


CASES = {
    optimized_lstm: 0,
    concatenated_input: 0,
    unequal_sizes: 0,
    nested_slices: 0,
    gates_as_rows: 0,
    gates_as_axis: 0,
    unstacked: 0,
    transposed_weights: 0,
    batched_heads: 2,  # of h itself, one per head
    two_axes: 3,  # of h itself, one per row; x[2]
    scalars: 2,  # x[0], x[1]
    dtypes: 5,  # z is read in halves and in thirds, which overlap
    surrogate_per_gate: 0,
    surrogate_on_all: 1,
    interleaved: 2,
    strided: 2,
    read_whole_too: 2,
    is_an_output_too: 2,
    overlapping: 2,
    unit_by_unit: 4 * N,
    several_results: 3,
    a_loop: 3,
    keys: 1,
    reads_literals: 1,
}


@functools.cache
def arguments():
    key = jax.random.key(0)
    shapes = {"w": (N, 4 * N), "u": (INPUTS, 4 * N), "b": (4 * N,), "k": (4, N, INPUTS)}
    params = {name: jax.random.normal(jax.random.fold_in(key, i), s) for i, (name, s) in enumerate(shapes.items())}
    h, x = jnp.linspace(-1, 1, N), jnp.linspace(0.3, -0.7, INPUTS)
    params["lstm"] = nn.OptimizedLSTMCell(N, param_dtype=jnp.float64).init(key, (h, h), x)
    return {**params, "key": key}, h, x


@pytest.mark.parametrize("cell", CASES, ids=lambda cell: cell.__name__)
def test_gate_by_gate_it_is_the_same_cell(cell):
    args = arguments()
    before = trace(cell, *args)
    after = unconcatenate(before)
    assert_same_function(before, after, args)
    assert multiply_adds(after) <= multiply_adds(before)
    assert taken_apart(after, after.inputs[-2:]) == CASES[cell]


@pytest.mark.parametrize("name", [*cells()])
def test_every_cell_of_the_zoo_stays_the_same(name):
    p = problem(name)
    carry, x = jax.tree.map(lambda leaf: leaf[0], (p.carry, p.xs[0]))
    before = trace(p.network.apply, p.params, carry, x)
    after = unconcatenate(before)
    assert multiply_adds(after) <= multiply_adds(before)
    if any(e.name in TAKES_APART for e in before.equations):
        assert_same_function(before, after, (p.params, carry, x))
    else:  # untouched, to the last variable
        kept = backward_slice(before.equations, before.outputs)
        assert [(e.primitive, e.params, e.inputs, e.outputs) for e in after.equations] == [
            (e.primitive, e.params, e.inputs, e.outputs) for e in kept
        ]


def test_a_wide_value_that_is_needed_whole_is_computed_once():
    for cell in (read_whole_too, is_an_output_too, overlapping, unit_by_unit, strided):
        after = unconcatenate(trace(cell, *arguments()))
        assert sum(e.name == "dot_general" for e in after.equations) == 2, cell


def test_the_backward_pass_is_gate_by_gate_too():
    params, h, x = arguments()
    args = {"lstm": params["lstm"]}, h, x
    program = unconcatenate(trace(optimized_lstm, *args))
    products = [shape_of(e.outputs[0]) for e in program.equations if e.name == "dot_general"]
    assert products == [(N,)] * 8
    backward = trace(lambda bar, *args: jax.vjp(lambda *args: run(program, *args), *args)[1](bar), [h, h], *args)
    varying = dependents(backward.equations, [*backward.inputs[:2], *backward.inputs[-2:]])
    assert sum(e.name == "dot_general" and set(e.outputs) <= varying for e in backward.equations) == 8 + 16
    wide = (*TAKES_APART, "concatenate", "pad")
    assert not [e.name for e in backward.equations if e.name in wide and set(e.outputs) <= varying]


def test_what_no_output_needs_is_left_out():
    program = unconcatenate(trace(lambda x: (jnp.sin(x), x[:1] * 2, jnp.split(x, 3)[1])[2], jnp.arange(3.0)))
    assert [e.name for e in program.equations] == ["slice"] or [e.name for e in program.equations] == ["split"]


SHAPES = [(2, 3, 2), (6, 2), (2, 6), (4, 3), (12,), (3, 2, 2), (1, 2, 1, 6)]


@pytest.mark.parametrize("old", SHAPES)
def test_a_slice_passes_a_reshape_where_it_is_a_block_on_both_sides(old):
    numbers = np.arange(12).reshape(old)
    for new in SHAPES:
        before = trace(lambda x: x.reshape(new), jnp.asarray(numbers))  # noqa: B023
        ranges = [itertools.combinations(range(size + 1), 2) for size in new]
        for window in itertools.product(*ranges):
            starts, stops = zip(*window, strict=True)
            params = {"start_indices": starts, "limit_indices": stops, "strides": None}
            sizes = tuple(np.subtract(stops, starts))
            part = Variable(jax.ShapeDtypeStruct(sizes, numbers.dtype))
            slicing = Equation(jax.lax.slice_p, params, before.outputs, [part])
            after = unconcatenate(before._replace(equations=[*before.equations, slicing], outputs=[part]))
            (seen,) = evaluate(after.equations, {after.inputs[0]: numbers}, after.outputs, by_numpy)
            needed = numbers.reshape(new)[tuple(slice(*ends) for ends in window)]
            np.testing.assert_array_equal(seen, needed)
            places = np.stack(np.unravel_index(needed.ravel(), old))
            is_block = np.prod(np.ptp(places, axis=1) + 1) == needed.size
            assert ("slice" not in [e.name for e in after.equations[1:]]) == is_block, (old, new, window)


def by_numpy(equation, *values):
    return rearrange(equation, values)


def test_literals_and_inputs_as_outputs():
    program = unconcatenate(trace(lambda x: (1.5, x, x, x[1:]), jnp.arange(3.0)))
    assert not is_variable(program.outputs[0]) and program.outputs[1] is program.outputs[2] is program.inputs[0]
