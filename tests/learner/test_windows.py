"""``value_and_grad(..., window=C)``: a loss that sees C steps together, against reverse mode of the same loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepeprop_jax import deep_eprop, random_feedback
from deepeprop_jax.reference import segment_oracle, stop_gradient_oracle, windowed_bptt
from deepeprop_jax.rules import uoro
from tests.gradients import FLOAT64, SAME, assert_same_gradient, relative_errors
from tests.segments.test_projected import setup as projected_setup
from tests.zoo import problem, start

STEPS, WINDOW, BATCH = 11, 3, 3  # three windows and a shorter one


def values_of(ys):
    """One number per step and example, of all outputs."""
    parts = [jnp.tanh(leaf).reshape(*leaf.shape[:2], -1).sum(-1) for leaf in jax.tree.leaves(ys)]
    return sum(parts)


def returns_loss(ys, targets):
    """Squared errors of lambda-returns, (C, batch), whose derivative goes through all steps of the window; the value
    behind the window stands in the targets."""
    values = values_of(ys)
    after = jnp.concatenate([values[1:], targets["next"][-1:]])

    def back(above, at):
        reward, discount, after = at
        found = reward + discount * (0.3 * after + 0.7 * above)
        return found, found

    _, returns = jax.lax.scan(back, after[-1], (targets["reward"], targets["discount"], after), reverse=True)
    return (returns - values) ** 2


def targets_of(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "reward": jnp.asarray(draw.normal(size=(STEPS, BATCH))),
        "discount": jnp.asarray(0.9 * (draw.random((STEPS, BATCH)) > 0.2)),
        "next": jnp.asarray(draw.normal(size=(STEPS, BATCH))),
    }


def flags_of(kind):
    if kind == "none":
        return None, None
    resets = jnp.zeros((STEPS, BATCH), bool).at[(1, 3, 8), (0, 1, 2)].set(True)
    return resets, jnp.ones((STEPS, BATCH), bool).at[(2, 4, 5, 10), (1, 0, 0, 2)].set(False)


def windows(tree):
    return [jax.tree.map(lambda leaf, s=s: leaf[s : s + WINDOW], tree) for s in range(0, STEPS, WINDOW)]


def total_of(losses, valid):
    return (losses if valid is None else jnp.where(valid, losses, 0)).sum()


def plain(network, params, carry, xs, resets, valid):
    """All outputs, by ``lax.scan``, and the carry at the end; nothing goes back from steps that are not valid."""

    def choose(where, a, b):
        return jax.tree.map(lambda x, y: jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)

    def step(before, at):
        x, reset, ok = at
        if reset is not None:
            before = choose(reset, carry, before)
        after, y = jax.vmap(network.apply, (None, 0, 0))(params, before, x)
        if ok is not None:
            after, y = choose(ok, after, before), choose(ok, y, jax.lax.stop_gradient(y))
        return after, y

    end, ys = jax.lax.scan(step, carry, (xs, resets, valid))
    return ys, end


def total_loss(ys, targets, valid):
    parts = zip(windows(ys), windows(targets), windows(valid), strict=True)
    return sum(total_of(returns_loss(y, target), ok) for y, target, ok in parts)


def check(name, kind, within="eprop", **options) -> None:
    p, targets, (resets, valid) = problem(name, steps=STEPS), targets_of(), flags_of(kind)
    learner = deep_eprop(p.network, **options)
    run = jax.jit(learner.value_and_grad(returns_loss, window=WINDOW, within_segment=within))
    (loss, end), grads = run(p.params, start(learner, p), p.xs, targets, resets, valid)

    def bptt(params):
        ys, end = plain(p.network, params, p.carry, p.xs, resets, valid)
        return total_loss(ys, targets, valid), (ys, end)

    (needed_loss, (ys, carry)), needed = jax.jit(jax.value_and_grad(bptt, has_aux=True))(p.params)
    np.testing.assert_allclose(loss, needed_loss, rtol=FLOAT64)
    assert_same_gradient(end.carry, carry, FLOAT64)
    whole = options.get("exact") and options.get("hops") is None
    if not whole:  # the gradient is linear in dL/dy, which is known beside it
        dys = jax.jit(jax.grad(total_loss))(ys, targets, valid)

        def linear(y, dy):
            return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(dy), strict=True))

        hops, localise = options.get("hops"), not options.get("exact", False)
        if within == "exact":
            reference = segment_oracle(p.network, linear, p.pairs, segment_length=WINDOW, localise=localise, hops=hops)
        else:
            reference = stop_gradient_oracle(p.network, linear, p.pairs, localise=localise, hops=hops)
        exact, (_, needed) = needed, jax.jit(reference)(p.params, p.carry, p.xs, dys, resets, valid)
        assert max(relative_errors(needed, exact).values()) > 1e-3
    assert_same_gradient(grads, needed, FLOAT64, f"{name}, {options}, {within}, {kind}")


@pytest.mark.parametrize("kind", ["none", "random"])
def test_windowed_bptt_is_reverse_mode_of_the_windows_losses(kind):
    p, targets, (resets, valid) = problem("linen_lstm", steps=STEPS), targets_of(), flags_of(kind)

    def total(params):
        ys, end = plain(p.network, params, p.carry, p.xs, resets, valid)
        return total_loss(ys, targets, valid), end

    needed = jax.jit(jax.value_and_grad(total, has_aux=True))(p.params)
    found = jax.jit(windowed_bptt(p.network, returns_loss, WINDOW))(p.params, p.carry, p.xs, targets, resets, valid)
    assert_same_gradient(found[0], needed[0], FLOAT64)
    assert_same_gradient(found[1], needed[1], FLOAT64)
    with jax.numpy_dtype_promotion("strict"):  # the loss has the dtype of loss_fn's, of less than a window too
        run = jax.jit(
            windowed_bptt(p.network, lambda ys, target: jnp.float32(0) * ys.sum(dtype=jnp.float32), STEPS + 1)
        )
        assert run(p.params, p.carry, p.xs, targets)[0][0].dtype == jnp.float32
    with pytest.raises(ValueError, match="window counts steps"):
        windowed_bptt(p.network, returns_loss, 0)


WIDE = [
    ("stack_3", "random", "eprop", {"exact": True}),
    ("graph_two_outputs", "none", "eprop", {"exact": True}),
    ("stack_3", "random", "eprop", {}),
    ("stack_3", "random", "eprop", {"hops": 0}),
    ("depth_4_between", "random", "eprop", {}),
    ("graph_two_outputs", "random", "exact", {}),
    ("stack_3", "none", "exact", {"hops": 0}),
]


@pytest.mark.parametrize(
    ("name", "kind", "within", "options"),
    [
        ("stack_2", "random", "eprop", {"exact": True}),
        ("stack_2", "random", "eprop", {}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE),
    ],
    ids=str,
)
def test_a_loss_on_a_window_is_that_of_reverse_mode(name, kind, within, options):
    check(name, kind, within, **options)


@pytest.mark.slow
def test_a_projected_carry_with_all_directions_is_bptt():
    p, targets, (resets, valid) = problem("stack_2", steps=STEPS), targets_of(), flags_of("random")
    _, learner, _, state = projected_setup(p, None)
    run = jax.jit(learner.value_and_grad(returns_loss, window=WINDOW))
    (_, _), grads = run(p.params, state, p.xs, targets, resets, valid)

    def bptt(params):
        return total_loss(plain(p.network, params, p.carry, p.xs, resets, valid)[0], targets, valid)

    assert_same_gradient(grads, jax.jit(jax.grad(bptt))(p.params), FLOAT64)


def test_a_window_of_losses_per_step_is_the_same_as_steps_and_aux_comes_out_in_time():
    p = problem("stack_2", steps=7)
    learner = deep_eprop(p.network)
    state = start(learner, p)

    def of_window(ys, targets):
        return jnp.sum(jax.vmap(p.loss_fn)(ys, targets)), {"y": ys, "steps": jnp.full(len(ys), len(ys))}

    run = jax.jit(learner.value_and_grad(of_window, window=3, has_aux=True))
    ((loss, aux), end), grads = run(p.params, state, p.xs, p.targets)
    steps = learner.value_and_grad(lambda y, target: (p.loss_fn(y, target), y), segment_length=3, has_aux=True)
    ((needed, ys), wanted_end), wanted = jax.jit(steps)(p.params, state, p.xs, p.targets)
    np.testing.assert_allclose(loss, needed, rtol=SAME)
    assert_same_gradient((grads, aux["y"], end.carry), (wanted, ys, wanted_end.carry), SAME)
    np.testing.assert_array_equal(aux["steps"], [3, 3, 3, 3, 3, 3, 1])


@pytest.mark.slow
def test_signals_are_made_of_each_steps_own_cotangent():
    p = problem("stack_2", steps=7)
    learner = deep_eprop(p.network, signals=("0",))
    feedback = random_feedback(jax.random.key(0), p.network, p.params, p.carry, p.xs[0], nodes=("0",))
    found = []
    for loss_fn, options in ((jax.vmap(p.loss_fn), {"window": 3}), (p.loss_fn, {"segment_length": 3})):
        total = (lambda ys, t, f=loss_fn: jnp.sum(f(ys, t))) if "window" in options else loss_fn
        run = jax.jit(learner.value_and_grad(total, signals=feedback, **options))
        found.append(run(p.params, start(learner, p), p.xs, p.targets)[1])
    assert_same_gradient(*found, SAME)


@pytest.mark.as_users
@pytest.mark.slow
def test_a_split_batch_gives_the_gradient_of_one_device():
    p = problem("stack_2", steps=7, batch=8)
    learner = deep_eprop(p.network)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Explicit,))

    def loss_fn(ys, targets):  # needs all examples and steps
        values = values_of(ys)
        return (values - values.mean()) ** 2 * targets[:, None]

    def run(params, carry, xs, targets, valid):
        state = learner.init(params, carry, xs[0])
        (loss, _), grads = learner.value_and_grad(loss_fn, window=3)(params, state, xs, targets, valid=valid)
        return loss, grads

    arguments = p.params, p.carry, p.xs, jnp.arange(7.0), jnp.ones((7, 8), bool).at[(3, 6), (1, 7)].set(False)
    places = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",), (None, "data"), (), (None, "data"))]
    moved = [jax.device_put(part, place) for part, place in zip(arguments, places, strict=True)]
    seen, needed = jax.device_get(jax.jit(run)(*moved)), jax.jit(run)(*arguments)
    assert_same_gradient(seen, needed, SAME)


def test_what_a_window_cannot_be_is_refused():
    p = problem("stack_2", steps=4)
    learner = deep_eprop(p.network)
    state = start(learner, p)

    def run(loss_fn, **options):
        return learner.value_and_grad(loss_fn, window=2, **options)(p.params, state, p.xs, p.targets)

    with pytest.raises(ValueError, match=r"window=3 and segment_length=2\. Leave out the latter"):
        learner.value_and_grad(returns_loss, window=3, segment_length=2)
    with pytest.raises(ValueError, match=r"window must be None or an integer.*seen 0"):
        learner.value_and_grad(returns_loss, window=0)
    with pytest.raises(ValueError, match=r"a window's outputs, or one loss per step and example, of shape \(2, 3\)"):
        run(lambda ys, targets: jnp.sum(ys, (0, 2)))
    with pytest.raises(ValueError, match=r"aux at 'mean' has shape \(\); of a window of 2 steps it needs one row"):
        run(lambda ys, targets: (jnp.sum(ys), {"mean": ys.mean()}), has_aux=True)
    with pytest.raises(ValueError, match=r"uoro goes step by step.*window"):
        uoro(p.network).value_and_grad(returns_loss, window=2)
