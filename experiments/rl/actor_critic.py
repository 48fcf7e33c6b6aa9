"""Streaming actor-critic(λ): one step of one environment, one update; nothing is stored but the state of the stream.

With s_t all that the network carries and sees at step t, a_t drawn from π(· | s_t), and the parameters θ of actor and
critic together:

    δ_t  =  r_{t+1} + γ v(s_{t+1}) - v(s_t)                                 v(s_{t+1}) = 0 where the episode terminates
    z^π_t  =  γ λ_π z^π_{t-1} + ∇ [log π(a_t | s_t) + β sign(δ_t) H(π(· | s_t))]              z = 0 before an episode
    z^v_t  =  γ λ_v z^v_{t-1} + ∇ v(s_t)
    θ  ←  θ + optimiser(δ_t (z^π_t + c z^v_t))

(R. S. Sutton and A. G. Barto, 2nd edition, eq. 12.5 to 12.7, actor-critic with eligibility traces, section 13.5). Each
∇ is the rule's gradient of this step's outputs by the parameters, through the carry and so through all of the episode
before it, as far as the rule carries credit. The entropy H has the sign of δ, which multiplies it, so that it always
grows (M. Elsayed, G. Vasan and A. R. Mahmood, "Streaming deep reinforcement learning finally works", arXiv:2410.14606,
algorithm 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepeprop_jax import (
    BasisLearner,
    CarryBasis,
    Cell,
    EligibilityTraceState,
    LearnerState,
    carry_basis,
    eligibility_trace,
    with_basis,
)
from experiments.rl.environments import Environment
from experiments.rl.rules import WINDOW, Rule

PyTree = Any


class Numbers(NamedTuple):
    """The numbers of the algorithm, by their letters above.

    Attributes:
      gamma: γ, the discount.
      policy_lambda, value_lambda: λ_π, λ_v.
      entropy: β.
      value_weight: c.
      reward_scale: what rewards are multiplied by before the algorithm sees them.
    """

    gamma: float
    policy_lambda: float
    value_lambda: float
    entropy: float
    value_weight: float
    reward_scale: float = 1.0


class Agent(NamedTuple):
    """An agent in its environment, between two steps.

    Attributes:
      key: for what is drawn.
      environment: its state.
      observation: what the next action is chosen on.
      begins: whether that is the first of an episode.
      returned: sum of the rewards of the episode so far.
      params, optimiser: θ, and the optimiser's state.
      learner: the learner's state.
      policy_trace, value_trace: z^π and z^v.
      basis: the directions of a projected carry; None without.
    """

    key: jax.Array
    environment: PyTree
    observation: jax.Array
    begins: jax.Array
    returned: jax.Array
    params: PyTree
    optimiser: PyTree
    learner: LearnerState
    policy_trace: EligibilityTraceState
    value_trace: EligibilityTraceState
    basis: CarryBasis | None


class Step(NamedTuple):
    """What happened in a step.

    Attributes:
      x: what the network saw, (1, inputs).
      begins: whether it was the first step of an episode.
      action, reward: chosen; got.
      error: δ.
      entropy: of the policy, in nats.
      ended: whether the episode was over then.
      returned: the sum of the episode's rewards up to then.
      cotangent: δ times the cotangents of this step's log π(a) and c v, in the network's output: the credit's source.
    """

    x: jax.Array
    begins: jax.Array
    action: jax.Array
    reward: jax.Array
    error: jax.Array
    entropy: jax.Array
    ended: jax.Array
    returned: jax.Array
    cotangent: jax.Array


def _along(y: jax.Array, cotangent: jax.Array) -> jax.Array:
    """A loss of which the cotangent is given."""
    return (y * cotangent).sum()


def seen_by(observation: jax.Array) -> jax.Array:
    """The network's input: the observation, and a number that is always 1 in place of biases; one example."""
    return jnp.append(observation, jnp.ones((), observation.dtype))[None]


class ActorCritic:
    """Pure functions of one agent; ``jax.vmap`` trains several seeds at once.

    Args:
      network: gives the logits of the actions, and one number more, v.
      rule: how the gradient of a step is found.
      environment: one of discrete actions.
      optimiser: of optax; what it is given points downward.
      numbers: see ``Numbers``.
    """

    def __init__(
        self,
        network: Cell,
        rule: Rule,
        environment: Environment,
        optimiser: optax.GradientTransformation,
        numbers: Numbers,
    ) -> None:
        self.learner = rule.learner(network)
        self._rule, self._environment, self._optimiser, self._numbers = rule, environment, optimiser, numbers
        self._traces = [
            eligibility_trace(numbers.gamma * decay) for decay in (numbers.policy_lambda, numbers.value_lambda)
        ]
        self._bases: BasisLearner | None = None
        if rule.projects:
            self._bases = carry_basis(self.learner, _along, segment_length=WINDOW, rate=0.1)

    def start(self, key: jax.Array) -> Agent:
        """An agent that has learnt nothing, at its first step."""
        environment_key, params_key, basis_key, key = jax.random.split(key, 4)
        environment, observation = self._environment.begin(environment_key)
        x = seen_by(observation)
        params, carry = self.learner.network.init(params_key, x)
        state, basis = self.learner.init(params, carry, x), None
        if self._bases is not None:
            basis = self._bases.init(basis_key, params, carry, x)
            state = with_basis(state, basis)
        begins, nothing = jnp.ones((), bool), jnp.zeros((), observation.dtype)
        traces = [trace.init(params) for trace in self._traces]
        return Agent(
            key, environment, observation, begins, nothing, params, self._optimiser.init(params), state, *traces, basis
        )

    def step(self, agent: Agent) -> tuple[Agent, Step]:
        """One step of the environment, one update."""
        numbers, actions, params = self._numbers, self._environment.actions, agent.params
        key, action_key, environment_key = jax.random.split(agent.key, 3)
        x = seen_by(agent.observation)
        forgets = jnp.full((1,), self._rule.forgets)
        state = self.learner.reset(agent.learner, agent.begins[None] | forgets)
        state, y = self.learner.step(params, state, x)
        action = jax.random.categorical(action_key, y[0, :actions])
        after = self._environment.step(environment_key, agent.environment, action)

        # The value of what comes next, at the same parameters; the step itself is taken after the update.
        carry = self.learner.reset(state, forgets).carry if self._rule.forgets else state.carry
        _, next_y = jax.vmap(self.learner.network.apply, (None, 0, 0))(params, carry, seen_by(after.last))
        reward = numbers.reward_scale * after.reward
        next_value = jnp.where(after.terminated, 0, next_y[0, actions])
        error = reward + numbers.gamma * next_value - y[0, actions]

        def policy(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            logs = jax.nn.log_softmax(y[0, :actions])
            entropy = -(jnp.exp(logs) * logs).sum()
            return logs[action] + numbers.entropy * jnp.sign(error) * entropy, entropy

        of_policy, entropy = jax.grad(policy, has_aux=True)(y)
        of_value = jnp.zeros_like(y).at[0, actions].set(1)
        gradients = jax.vmap(lambda dy: self.learner.gradient(params, state, dy))(jnp.stack([of_policy, of_value]))
        (policy_z, policy_trace), (value_z, value_trace) = (
            trace.update(jax.tree.map(lambda leaf, i=i: leaf[i], gradients), held, reset=agent.begins)
            for i, (trace, held) in enumerate(zip(self._traces, (agent.policy_trace, agent.value_trace), strict=True))
        )
        downward = jax.tree.map(lambda p, v: -error * (p + numbers.value_weight * v), policy_z, value_z)
        updates, optimiser = self._optimiser.update(downward, agent.optimiser, params)

        ended, returned = after.terminated | after.truncated, agent.returned + after.reward
        cotangent = error * (of_policy + numbers.value_weight * of_value)
        seen = Step(x, agent.begins, action, after.reward, error, entropy, ended, returned, cotangent)
        agent = Agent(
            key,
            after.state,
            after.observation,
            ended,
            jnp.where(ended, 0, returned),
            optax.apply_updates(params, updates),
            optimiser,
            state,
            policy_trace,
            value_trace,
            agent.basis,
        )
        return agent, seen

    def advance(self, agent: Agent, steps: int) -> tuple[Agent, Step]:
        """So many steps, and what happened in each; a projected carry then gets the directions that they have shown.

        Args:
          steps: with a projected carry a multiple of ``WINDOW``.
        """

        def one(agent: Agent, _: None) -> tuple[Agent, Step]:
            return self.step(agent)

        if self._bases is None:
            return jax.lax.scan(one, agent, length=steps)
        bases = self._bases
        key, basis_key = jax.random.split(agent.key)
        agent = agent._replace(key=key)

        def window(loop: tuple[Agent, PyTree], _: None) -> tuple[tuple[Agent, PyTree], Step]:
            agent, shown = loop
            after, seen = jax.lax.scan(one, agent, length=WINDOW)
            shown = bases.observe(
                shown, agent.params, agent.learner, seen.x, seen.cotangent, resets=seen.begins[:, None]
            )
            return (after, shown), seen

        shown = bases.begin(agent.basis, basis_key, agent.learner.carry)
        (agent, shown), seen = jax.lax.scan(window, (agent, shown), length=steps // WINDOW)
        basis = bases.choose(agent.basis, shown)
        seen = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen)
        return agent._replace(basis=basis, learner=with_basis(agent.learner, basis)), seen
