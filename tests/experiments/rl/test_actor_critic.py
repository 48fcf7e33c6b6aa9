"""The streaming actor-critic: its update is the gradient of an episode, by an oracle that knows no trace; it learns."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs.rl import get_config
from deepeprop_jax import Cell, deep_eprop, stack
from deepeprop_jax.rules import immediate
from experiments.rl import training
from experiments.rl.actor_critic import ActorCritic, Numbers, seen_by
from experiments.rl.environments import Moved, in_episodes
from experiments.rl.one_step import OneStep
from experiments.rl.rules import RULES, Rule
from tests.gradients import assert_same_gradient

NUMBERS = Numbers(gamma=0.9, policy_lambda=0.6, value_lambda=0.8, entropy=0.1, value_weight=0.5, reward_scale=2.0)
STEPS = 11


def wandering(cut: int, limit: int):
    """Numbers that the action moves, in float64; an episode terminates after ``cut`` steps, or is cut at ``limit``."""

    def observe(state):
        return jnp.stack([state[0], jnp.cos(state[0] * 3)])

    def begin(key):
        state = jax.random.normal(key, (), float), jnp.zeros((), int)
        return state, observe(state)

    def move(key, state, action):
        after = state[0] * 0.5 + action + jax.random.normal(key, (), float), state[1] + 1
        return Moved(after, observe(after), jnp.sin(after[0]), after[1] >= cut, after[1] >= limit)

    return in_episodes(begin, move, actions=3, best=1.0, chance=0.0)


def dense(features):
    """A layer whose units feed each other: deep e-prop is not exact for it."""

    def init(key, x):
        keys = jax.random.split(key, 2)
        shapes = {"w": (x.shape[-1], features), "u": (features, features)}
        params = {
            name: jax.random.normal(k, shape, float) / 2 for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return params, jnp.zeros((len(x), features))

    def apply(params, h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"])
        return h, h

    return Cell(init, apply)


def summed():
    """An optimiser that moves nothing, and whose state is the sum of what it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), optax.tree.add(state, updates)),
    )


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("cut, limit", [(5, 100), pytest.param(100, 4, marks=pytest.mark.slow)])
def test_the_update_is_the_gradient_through_whole_episodes(cut, limit):
    """With the parameters held: sum over t of A_t (log pi + beta sign(delta) H) + c B_t v, A and B sums of delta's."""
    network = stack(dense(3), dense(2), Cell(lambda k, x: ({"w": jnp.eye(2, 4)}, ()), lambda p, h, x: (h, x @ p["w"])))
    environment = wandering(cut, limit)
    agent = ActorCritic(network, Rule(partial(deep_eprop, exact=True)), environment, summed(), NUMBERS)
    start = jax.jit(agent.start)(jax.random.key(3))
    end, seen = jax.jit(agent.advance, static_argnums=1)(start, STEPS)
    _, carry = network.init(jax.random.key(0), seen.x[0])
    episode = np.cumsum(np.asarray(seen.begins))
    assert episode[-1] >= 3 and len(set(np.asarray(seen.action).tolist())) > 1

    def outputs(params):
        """Of every step, each episode from the first carry."""

        def one(h, at):
            x, begins = at
            h = jax.tree.map(lambda first, leaf: jnp.where(begins, first, leaf), carry, h)
            return jax.vmap(network.apply, (None, 0, 0))(params, h, x)

        return jax.lax.scan(one, carry, (seen.x, seen.begins))[1][:, 0]

    # delta by hand: the next value is that of the next observation, at the end of an episode of its own last one.
    ys = np.asarray(jax.jit(outputs)(start.params))
    values, errors = ys[:, 3], np.asarray(seen.error)
    for t in range(STEPS - 1):
        if not seen.ended[t]:
            expected = NUMBERS.reward_scale * seen.reward[t] + NUMBERS.gamma * values[t + 1] - values[t]
            np.testing.assert_allclose(errors[t], expected, rtol=1e-9)
        elif cut < limit:
            np.testing.assert_allclose(errors[t], NUMBERS.reward_scale * seen.reward[t] - values[t], rtol=1e-9)

    def ahead(decay):
        """Of every step the sum of the errors from it on, within its episode, each step weighted by one decay more."""
        return np.array(
            [
                sum(decay ** (k - t) * errors[k] for k in range(t, STEPS) if episode[k] == episode[t])
                for t in range(STEPS)
            ]
        )

    of_policy, of_value = (ahead(NUMBERS.gamma * decay) for decay in (NUMBERS.policy_lambda, NUMBERS.value_lambda))

    def ascended(params):
        ys = outputs(params)
        logs = jax.nn.log_softmax(ys[:, :3])
        entropy = -(jnp.exp(logs) * logs).sum(-1)
        chosen = logs[jnp.arange(STEPS), seen.action] + NUMBERS.entropy * jnp.sign(seen.error) * entropy
        return (of_policy * chosen + NUMBERS.value_weight * of_value * ys[:, 3]).sum()

    expected = jax.tree.map(jnp.negative, jax.jit(jax.grad(ascended))(start.params))
    assert_same_gradient(end.optimiser, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.mixed_promotion
def test_the_value_of_a_step_that_is_cut_is_not_dropped():
    """At a time limit delta has the value of the last observation, which the next episode does not show."""
    environment = wandering(100, 1)
    agent = ActorCritic(stack(dense(3), dense(4)), Rule(deep_eprop), environment, summed(), NUMBERS)
    start = jax.jit(agent.start)(jax.random.key(0))
    end, seen = jax.jit(agent.step)(start)
    *_, environment_key = jax.random.split(start.key, 3)
    after = environment.step(environment_key, start.environment, seen.action)
    apply = jax.vmap(agent.learner.network.apply, (None, 0, 0))
    carry, y = apply(start.params, start.learner.carry, seen.x)
    _, last = apply(start.params, carry, seen_by(after.last))
    assert seen.ended and end.begins
    expected = NUMBERS.reward_scale * seen.reward + NUMBERS.gamma * last[0, 3] - y[0, 3]
    np.testing.assert_allclose(seen.error, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.mixed_promotion
def test_one_step_has_the_gradient_of_immediate():
    network = stack(dense(3), dense(2))
    xs = jax.random.normal(jax.random.key(0), (4, 3, 2))
    params, carry = network.init(jax.random.key(1), xs[0])
    dy, where = jax.random.normal(jax.random.key(2), (3, 2)), jnp.array([True, False, False])

    def gradients(learner):
        state, found = learner.init(params, carry, xs[0]), []
        for t, x in enumerate(xs):
            state = learner.reset(state, where & (t == 2))
            state, _ = learner.step(params, state, x)
            found.append(learner.gradient(params, state, dy))
        return found

    for one, other in zip(gradients(OneStep(network)), gradients(immediate(network)), strict=True):
        assert_same_gradient(one, other, 1e-9)


def small() -> ml_collections.ConfigDict:
    """A chain of 4 steps, 8 units."""
    config = get_config()
    config.seeds, config.network.features = (0, 1), 8
    task = config.tasks.chain_8
    task.learning_rate, task.network = 1e-2, {"readout": 0.1}
    task.options = {"length": 4, "noise": 0.1}
    task.steps, task.report_every = 28_000, 4_000
    return config


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(
    "rule, learns", [("deep e-prop", True), pytest.param("feed-forward", False, marks=pytest.mark.slow)]
)
def test_a_short_chain_is_learnt_by_who_remembers(rule, learns):
    config = small()
    last = list(training.records(config, config.tasks.chain_8, rule))[-1]
    assert last.step == 28_000 and (last.episodes > 500).all()
    assert (last.returned > 0.75).all() if learns else (abs(last.returned) < 0.2).all()


@pytest.mark.slow
@pytest.mark.mixed_promotion
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_advances(rule):
    config = small()
    config.network.features, config.seeds = 3, (0,)
    agent = training.make_actor_critic(config, config.tasks.chain_8, rule)
    start = jax.jit(agent.start)(jax.random.key(0))
    end, seen = jax.jit(agent.advance, static_argnums=1)(start, 16)
    assert seen.x.shape == (16, 1, 4) and bool(jnp.isfinite(seen.error).all())
    assert jnp.isfinite(optax.global_norm(end.params)) and (end.basis is not None) == RULES[rule].projects
    moved = optax.global_norm(optax.tree.sub(end.params, start.params))
    assert moved > 0
    if RULES[rule].projects:
        assert end.basis.updates == 1 and not jnp.allclose(end.basis.directions, start.basis.directions)
