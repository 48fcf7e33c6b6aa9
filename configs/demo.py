"""The demo: two tasks, seven rules, three minutes."""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.rules = ("BPTT", "exact RTRL", "deep e-prop", "R = 4", "random feedback", "hops = 0", "lower frozen")
    config.seeds = (0, 1, 2)
    config.threshold = 0.9

    # Two GRU layers, small enough for exact RTRL: its traces hold n × |θ| numbers for each example.
    config.digits = ml_collections.ConfigDict()
    config.digits.features = 12
    config.digits.blank = 8
    config.digits.batch = 16
    config.digits.learning_rate = 2e-2
    config.digits.updates = 700
    config.digits.updates_per_call = 25

    config.xor_count = ml_collections.ConfigDict()
    config.xor_count.features = 16
    config.xor_count.width = 8
    config.xor_count.cues = 5
    config.xor_count.gap = 3
    config.xor_count.delay = 10
    config.xor_count.decay = 0.99
    # Detectors whose biases start at zero stay long on a plateau.
    config.xor_count.bias_scale = 0.5
    config.xor_count.batch = 64
    config.xor_count.learning_rate = 1e-2
    config.xor_count.updates = 400
    config.xor_count.updates_per_call = 50
    config.xor_count.test_size = 1000
    return config
