"""The learning rules that are compared: one line each in ``RULES``.

A rule is one way to the gradient of a step; network, actor-critic and every number are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from deepeprop_jax import Cell, OnlineLearner, deep_eprop
from experiments.rl.one_step import OneStep

WINDOW = 8
"""Single steps that go into one projection of a projected carry."""


class Rule(NamedTuple):
    """A learning rule.

    Attributes:
      learner: made of the network.
      forgets: whether the carry returns to its start before every step, so that the network has no memory.
      projects: whether the learner has a projected carry, whose directions are learnt on the way.
    """

    learner: Callable[[Cell], OnlineLearner | OneStep]
    forgets: bool = False
    projects: bool = False


RULES: dict[str, Rule] = {
    "exact RTRL": Rule(partial(deep_eprop, exact=True)),
    "deep e-prop": Rule(deep_eprop),
    "R = 4": Rule(partial(deep_eprop, carry_rank=4, project_every=WINDOW), projects=True),
    "hops = 0": Rule(partial(deep_eprop, hops=0)),
    "TBPTT(1)": Rule(OneStep),
    "feed-forward": Rule(OneStep, forgets=True),
}
