"""exact=True is deep RTRL: it equals backpropagation through time, for every cell and every topology."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepeprop_jax import deep_eprop
from deepeprop_jax.reference import bptt, forward_rtrl
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import cells, networks, problem, start

SANDWICHES = [f"sandwich/{name}" for name, cell in cells().items() if len(cell.input_shape) == 1]


# Like others but for one thing, and left to `make slow`.
ALIKE = [
    *(f"tower_{cell}_{depth}" for cell in ("lru", "indrnn", "lif_no_lateral") for depth in (1, 2)),
    *(
        "lif_zero_reset",
        "nnx_gru",
        "nnx_lstm",
        "nnx_optimized_lstm",
        "linen_optimized_lstm",
        "graph_skip",
        "graph_nested_stack",
        "depth_4",
        "rtu",
        "stack_3_encoder",
        "stack_5",
        "depth_4_lstm",
        "depth_4_below_recurrent",
        "deep_below_deep",
    ),
]
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in (*cells(), *networks())]
SEGMENT = 4  # of 12 steps: three segments, and one program for all of them


def library_gradient(p, segment_length: int | None = SEGMENT, within_segment: str = "eprop", **options):
    """Loss and gradient of the library, for any targets; as one segment it would compare BPTT with itself."""
    learner = deep_eprop(p.network, **options)
    state = start(learner, p)
    segments = {"segment_length": segment_length, "within_segment": within_segment}
    run = jax.jit(learner.value_and_grad(p.loss_fn, **segments))

    def gradient(targets):
        (loss, _), grads = run(p.params, state, p.xs, targets)
        return loss, grads

    return gradient


def check_equals_bptt(name: str, tolerance: float = FLOAT64, dtype=jnp.float64, **options) -> None:
    every, last = problem(name, dtype), problem(name, dtype, loss="last")
    seen = library_gradient(every, **options)
    # Parameters as arguments: XLA would fold constants with another rounding than the program's own.
    needed = jax.jit(bptt(every.network, every.loss_fn))
    for p, where in ((every, "loss at every step"), (last, "loss at the last step")):
        loss, grads = seen(p.targets)
        (loss_bptt, _), grads_bptt = needed(p.params, p.carry, p.xs, p.targets)
        assert jnp.allclose(loss, loss_bptt, rtol=tolerance)
        assert_same_gradient(grads, grads_bptt, tolerance, f"{name}, {where}")


@pytest.mark.parametrize("name", ALL)
def test_exact_equals_bptt(name):
    check_equals_bptt(name, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SANDWICHES)
def test_exact_equals_bptt_between_recurrent_layers(name):
    check_equals_bptt(name, exact=True)


@pytest.mark.parametrize("name", ["linen_gru", "stack_3", "graph_diamond"])
def test_exact_equals_forward_mode_through_the_scan(name):
    p = problem(name)
    _, grads = library_gradient(p, exact=True)(p.targets)
    _, needed = jax.jit(forward_rtrl(p.network, p.loss_fn))(p.params, p.carry, p.xs, p.targets)
    assert_same_gradient(grads, needed, FLOAT64, name)
