"""The environments: transitions, rewards, ends and observations, against rules by hand."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.program.refusal import Refused
from experiments.rl.cart_pole import accelerated, masked_cart_pole
from experiments.rl.from_gymnax import from_gymnax
from experiments.rl.memory_chain import memory_chain

KEY = jax.random.key(0)


def played(environment, choose, steps, key=KEY):
    """The first observation, and so many transitions; ``choose(index, observation)`` gives the action."""
    state, observation = environment.begin(key)
    step, found = jax.jit(environment.step), []
    first = observation
    for index in range(steps):
        transition = step(jax.random.fold_in(key, index), state, choose(index, np.asarray(observation)))
        found.append(jax.tree.map(np.asarray, transition))
        state, observation = transition.state, transition.observation
    return np.asarray(first), found


def test_memory_chain_shows_its_cue_once_and_asks_at_its_end():
    length, cues = 3, []
    memory = {}

    def remember(index, observation):
        if observation[0]:
            memory["cue"] = observation[2]
            cues.append(observation[2])
        return int(memory["cue"] > 0) if index < 25 else int(memory["cue"] < 0)

    first, seen = played(memory_chain(length, noise=0.5), remember, 40)
    observations = [first, *(one.observation for one in seen)]
    for step, observation in enumerate(observations):
        place = step % (length + 2)
        assert observation[:2].tolist() == [place == 0, place == length + 1]
        assert abs(observation[2]) == 1 if place == 0 else (observation[2] == 0) == (place == length + 1)
    for step, one in enumerate(seen):
        asked = step % (length + 2) == length + 1
        assert bool(one.terminated) == asked and not one.truncated
        assert one.reward == (0 if not asked else 1 if step < 25 else -1)
        np.testing.assert_array_equal(one.last, [0, 1, 0] if step % (length + 2) == length else one.last)
    assert set(cues) == {-1.0, 1.0}
    noises = [one.observation[2] for one in seen if not one.observation[:2].any()]
    assert len(set(noises)) == len(noises)


def test_the_last_observation_of_a_chain_is_not_that_of_the_next():
    _, seen = played(memory_chain(1), lambda index, observation: 0, 3)
    assert seen[-1].terminated and seen[-1].observation[0] == 1 and seen[-1].last[0] == 0


def pushed(body, action):
    """Gym's CartPole-v1, written out in Python."""
    x, speed, angle, turning = body
    force = 10.0 if action == 1 else -10.0
    temporary = (force + 0.05 * turning**2 * math.sin(angle)) / 1.1
    swing = (9.8 * math.sin(angle) - math.cos(angle) * temporary) / (
        0.5 * (4.0 / 3.0 - 0.1 * math.cos(angle) ** 2 / 1.1)
    )
    drive = temporary - 0.05 * swing * math.cos(angle) / 1.1
    return [x + 0.02 * speed, speed + 0.02 * drive, angle + 0.02 * turning, turning + 0.02 * swing]


def test_cart_pole_moves_as_gyms_and_hides_its_velocities():
    environment = masked_cart_pole(limit=500)
    state, first = environment.begin(KEY)
    body = np.asarray(state[0], float).tolist()
    assert first.shape == (2,) and all(-0.05 <= number <= 0.05 for number in body)
    _, seen = played(environment, lambda index, observation: int(index % 3 == 0), 60)
    ends = [index for index, one in enumerate(seen) if one.terminated]
    for index, one in enumerate(seen[: ends[0] + 1]):
        body = pushed(body, index % 3 == 0)
        np.testing.assert_allclose(one.last, [body[0] / 2.4, body[2] / math.radians(12)], rtol=1e-4)
        assert one.reward == 1 and not one.truncated
        assert bool(one.terminated) == (abs(body[0]) > 2.4 or abs(body[2]) > math.radians(12))
    assert (abs(seen[ends[0]].observation) < 0.3).all()  # a new episode


def test_cart_pole_is_cut_at_its_limit():
    _, seen = played(masked_cart_pole(limit=4), lambda index, observation: index % 2, 9)
    assert [bool(one.truncated) for one in seen] == [index % 4 == 3 for index in range(9)]
    assert not any(one.terminated for one in seen)


@pytest.mark.parametrize("options", [{"length": 0}, {"noise": -1.0}, {"noise": float("nan")}])
def test_a_chain_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="seen"):
        memory_chain(**options)


class Counter:
    """An environment with the interface of gymnax 1.0: a number counts up to the chosen one, and is cut at 5."""

    def action_space(self, params):
        return SimpleNamespace(n=3)

    def reset(self, key, params):
        return jnp.array([0, params.offset]), jnp.zeros((), int)

    def step(self, key, state, action, params):
        count = state + 1
        terminated, truncated = count == action + 2, count >= 5
        done = terminated | truncated
        final = jnp.stack([count, jnp.asarray(params.offset)])
        observation = jnp.where(done, jnp.array([0, params.offset]), final)
        info = {"final_observation": final}
        return observation, jnp.where(done, 0, count), count * 1.0, terminated, truncated, info


class Params(SimpleNamespace):
    def replace(self, **fields):
        return Params(**{**vars(self), **fields})


@pytest.fixture
def gymnax(monkeypatch):
    def make(name):
        if name != "Counter":
            raise ValueError(f"{name} is not in registered gymnax environments.")
        return Counter(), Params(offset=7)

    monkeypatch.setitem(sys.modules, "gymnax", SimpleNamespace(make=make))


@pytest.mark.mixed_promotion
def test_an_environment_of_gymnax(gymnax):
    environment = from_gymnax("Counter", best=3.0, seen=(0,))
    assert environment.actions == 3 and environment.best == 3
    first, seen = played(environment, lambda index, observation: 0 if index < 2 else 7, 7)
    assert first.tolist() == [0] and first.dtype == np.float32
    assert [one.last.tolist() for one in seen] == [[1], [2], [1], [2], [3], [4], [5]]
    assert [one.observation.tolist() for one in seen] == [[1], [0], [1], [2], [3], [4], [0]]
    assert [bool(one.terminated) for one in seen] == [index == 1 for index in range(7)]
    assert [bool(one.truncated) for one in seen] == [index == 6 for index in range(7)]
    shifted = from_gymnax("Counter", best=3.0, params={"offset": 9})
    assert shifted.begin(KEY)[1].tolist() == [0, 9]


def test_what_gymnax_does_not_have_is_refused(gymnax, monkeypatch):
    with pytest.raises(Refused, match="no environment 'Nothing'"):
        from_gymnax("Nothing", best=1.0)
    monkeypatch.setattr(Counter, "action_space", lambda self, params: SimpleNamespace(low=0))
    with pytest.raises(Refused, match="no discrete actions"):
        from_gymnax("Counter", best=1.0)
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(Refused, match=r"not installed .*: pip install -e '.\[rl\]'"):
        from_gymnax("Counter", best=1.0)


@pytest.mark.mixed_promotion
def test_gymnaxs_own_cart_pole_is_ours():
    pytest.importorskip("gymnax", reason="gymnax is not installed: pip install -e '.[rl]'")
    environment = from_gymnax("CartPole-v1", best=500.0, seen=(0, 2))
    state, _ = environment.begin(KEY)
    for index in range(17):
        body = jnp.stack([state.x, state.x_dot, state.theta, state.theta_dot])
        transition = environment.step(jax.random.key(index), state, jnp.asarray(index % 3 == 0, jnp.int32))
        np.testing.assert_allclose(transition.last, accelerated(body, index % 3 == 0)[jnp.array([0, 2])], rtol=1e-4)
        state = transition.state
    with pytest.raises(Refused, match="no discrete actions"):
        from_gymnax("Pendulum-v1", best=0.0)
