"""The gradient is a function of the parameters, to be differentiated: ``jax.grad``, ``jax.jvp``, ``jax.hessian``.

With ``exact=True`` its derivative is that of BPTT's gradient. The reference is BPTT through a loop that is written out:
JAX itself, where it differentiates twice through ``lax.scan``, loses the surrogate derivative of a ``custom_jvp``.
Deep e-prop's derivative is compared with finite differences of its own gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop
from deepeprop_jax.reference import is_differentiable
from deepeprop_jax.reference.backpropagation import reverse_mode
from tests.gradients import FLOAT64, assert_same_gradient
from tests.zoo import cells, networks, problem

STEPS = 7
FINITE_DIFFERENCES = 1e-6  # rounding of central differences with a step of 1e-5 in float64: 1e-11 / 1e-5


def written_out(step, carry, steps):
    """Every step of the loop is traced by itself."""
    total = 0.0
    for t in range(STEPS):
        carry, loss = step(carry, jax.tree.map(lambda leaf, t=t: leaf[t], steps))
        total = total + loss
    return carry, total


class Directions:
    """Real numbers in place of the differentiable leaves of a pytree, and fixed random directions."""

    def __init__(self, tree):
        leaves, self.structure = jax.tree.flatten(tree)
        self.rest = leaves
        self.places = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
        self.values = [leaves[i] for i in self.places]
        draw = np.random.default_rng(0)
        self.along = [jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) for leaf in self.values]

    def tree(self, values):
        leaves = list(self.rest)
        for place, value in zip(self.places, values, strict=True):
            leaves[place] = value
        return jax.tree.unflatten(self.structure, leaves)

    def onto(self, gradient):
        """A number: the gradient along the directions."""
        leaves = [jax.tree.leaves(gradient)[place] for place in self.places]
        return sum(jnp.real(jnp.vdot(a, b)) for a, b in zip(self.along, leaves, strict=True))


def gradient_of(p, kind, **options):
    """``(params, carry) -> gradient``, by segments of ``kind`` steps or, for "stream", by ``step`` and ``gradient``."""
    learner = deep_eprop(p.network, **options)

    def by_segments(params, carry, **segments):
        state = learner.init(params, carry, p.xs[0])
        return learner.value_and_grad(p.loss_fn, **segments)(params, state, p.xs, p.targets)[1]

    def by_steps(params, carry):
        state, total = learner.init(params, carry, p.xs[0]), None
        for t in range(STEPS):
            x, target = jax.tree.map(lambda leaf, t=t: leaf[t], (p.xs, p.targets))
            state, y = learner.step(params, state, x)
            grads = learner.gradient(params, state, jax.grad(p.loss_fn, allow_int=True)(y, target))
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return total

    if kind == "stream":
        return by_steps
    inside = {"within_segment": "exact"} if kind == "inside" else {}
    return lambda params, carry: by_segments(params, carry, segment_length=3 if kind == "inside" else kind, **inside)


def check_exact(name: str, kinds: tuple) -> None:
    """The derivative by parameters and by the first carry, of the gradient along a direction."""
    p = problem(name, steps=STEPS, batch=2)
    everything, of_params = Directions((p.params, p.carry)), Directions(p.params)

    def derivative(gradient):
        onto = lambda values: of_params.onto(gradient(*everything.tree(values)))  # noqa: E731
        return jax.jit(jax.grad(onto))(everything.values)

    bptt = reverse_mode(p.network.apply, p.loss_fn, written_out)
    needed = derivative(lambda params, carry: bptt(params, carry, p.xs, p.targets)[1])
    for kind in kinds:
        seen = derivative(gradient_of(p, kind, exact=True))
        assert_same_gradient(seen, needed, FLOAT64, f"{name}, {kind}")


def check_own_differences(name: str, kind, **options) -> None:
    p = problem(name, steps=STEPS, batch=2)
    params = Directions(p.params)
    gradient = gradient_of(p, kind, **options)

    def along(length):
        moved = [value + length * step for value, step in zip(params.values, params.along, strict=True)]
        return params.onto(gradient(params.tree(moved), p.carry))

    both = jax.jit(jax.value_and_grad(along))
    (at, slope), wide, narrow = both(0.0), *(_difference(both, step) for step in (1e-5, 5e-6))
    assert np.isfinite(slope)
    # Both are off by their step squared, with low rank a thousand times more than without.
    assert abs(slope - (4 * narrow - wide) / 3) < FINITE_DIFFERENCES * max(abs(slope), abs(at)), f"{name}, {kind}"


def _difference(function, step: float):
    return (function(step)[0] - function(-step)[0]) / (2 * step)


TRAINED = [name for name in (*cells(), *networks()) if name != "linen_squash"]  # which has no parameters
OWN = [(1, {}), (3, {}), (3, {"hops": 0}), (3, {"hops": 0, "rank": 2}), ("inside", {}), ("stream", {"hops": 0})]


@pytest.mark.parametrize(("name", "kinds"), [("derived_leaves", (1, 3, STEPS)), ("alif", (3,))])
def test_exact_has_the_derivative_of_bptt(name, kinds):
    check_exact(name, kinds)


@pytest.mark.parametrize(("kind", "options"), OWN)
def test_deep_eprop_has_the_derivative_of_its_own_gradient(kind, options):
    check_own_differences("derived_leaves", kind, **options)


@pytest.mark.slow
def test_low_rank_in_a_stream_has_the_derivative_of_its_own_gradient():
    check_own_differences("indrnn", "stream", hops=0, rank=2)


def test_forward_mode_and_hessians():
    """Of the loss: its first derivative is the gradient, its second that of BPTT's loss."""
    p = problem("derived_leaves", steps=STEPS, batch=2)
    learner, bptt = deep_eprop(p.network, exact=True), reverse_mode(p.network.apply, p.loss_fn)
    bias = next(key for key, leaf in p.params.items() if leaf.ndim == 1)

    def online(value):
        params = p.params | {bias: value}
        state = learner.init(params, p.carry, p.xs[0])
        (loss, _), grads = learner.value_and_grad(p.loss_fn, segment_length=3)(params, state, p.xs, p.targets)
        return loss, grads[bias]

    def offline(value):
        return bptt(p.params | {bias: value}, p.carry, p.xs, p.targets)[0][0]

    needed = jax.jit(jax.hessian(offline))(p.params[bias])
    seen = jax.jit(
        lambda value: (jax.hessian(lambda v: online(v)[0])(value), jax.jacfwd(lambda v: online(v)[1])(value))
    )
    for hessian in seen(p.params[bias]):
        np.testing.assert_allclose(hessian, needed, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.sweep
@pytest.mark.parametrize("name", TRAINED)
def test_exact_has_the_derivative_of_bptt_on_the_whole_zoo(name):
    check_exact(name, (1, 3, STEPS))


def spikes(name: str) -> bool:
    """Where a gradient jumps with a spike, finite differences see nothing between two jumps."""
    parts = (cells()[name],) if name in cells() else networks()[name].cells
    return any(cell.distance for cell in parts)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in TRAINED if not spikes(name)])
def test_deep_eprop_has_the_derivative_of_its_own_gradient_on_the_whole_zoo(name):
    for kind, options in OWN:
        check_own_differences(name, kind, **options)
