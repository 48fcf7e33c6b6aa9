"""Streaming actor-critic: every number of each task, the same for all rules of it."""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.rules = ("exact RTRL", "deep e-prop", "R = 4", "hops = 0", "TBPTT(1)", "feed-forward")
    config.seeds = (0, 1, 2, 3, 4)
    config.threshold = 0.9  # of the best return

    # Two recurrent layers: |r| of a unit per step at the start, its largest angle in radians. Below a readout whose
    # weights all move at the learning rate the policy would be sure of itself before it has learnt what to remember.
    config.network = ml_collections.ConfigDict()
    config.network.features = 16
    config.network.lower = (0.0, 0.9)
    config.network.upper = (0.95, 0.9995)
    config.network.max_phase = 0.3
    config.network.readout = 0.1

    # RMSprop, of which no number moves a parameter by more than the learning rate; it falls linearly to a tenth.
    config.learning_rate = 5e-3
    config.rms_decay = 0.999

    # Of the algorithm. Chosen by deep e-prop on the chains of 8 and 32 steps.
    config.numbers = ml_collections.ConfigDict()
    config.numbers.gamma = 0.99
    config.numbers.policy_lambda = 0.0
    config.numbers.value_lambda = 0.3
    config.numbers.entropy = 0.02
    config.numbers.value_weight = 0.5
    config.numbers.reward_scale = 1.0

    config.tasks = ml_collections.ConfigDict()
    for length, steps in ((8, 100_000), (32, 400_000), (128, 500_000)):
        task = ml_collections.ConfigDict()
        task.title = f"memory chain of {length}"
        task.environment = "memory_chain"
        task.options = {"length": length, "noise": 0.3}
        task.numbers = {}
        task.learning_rate, task.network = 3e-3, {"readout": 1.0}
        task.steps, task.report_every = steps, steps // 50
        config.tasks[f"chain_{length}"] = task

    # Rewards of 1 at every step: scaled by 1 - gamma, so that values lie between 0 and 1.
    task = ml_collections.ConfigDict()
    task.title = "cart-pole without velocities"
    task.environment = "masked_cart_pole"
    task.options = {"limit": 500}
    task.numbers = {"policy_lambda": 0.9, "value_lambda": 0.9, "reward_scale": 0.01}
    task.steps, task.report_every = 240_000, 4_800
    config.tasks.cart_pole = task

    # The same two of gymnax, where it is installed.
    task = ml_collections.ConfigDict()
    task.title = "gymnax's CartPole-v1 without velocities"
    task.environment = "gymnax"
    task.options = {"name": "CartPole-v1", "best": 500.0, "seen": (0, 2)}
    task.numbers = {"policy_lambda": 0.9, "value_lambda": 0.9, "reward_scale": 0.01}
    task.steps, task.report_every = 240_000, 4_800
    config.tasks.gymnax_cart_pole = task
    return config
