"""XOR-count through dense relays: credit through several layers and time."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "relay_ladder"
    config.learning_rate = 3e-3
    config.batches = 1500
    config.evaluate_every = 50
    config.checkpoint_every = 250
    config.relay_ladder = ml_collections.ConfigDict()
    config.relay_ladder.features = 16
    config.relay_ladder.depth = 3
    config.relay_ladder.width = 8
    config.relay_ladder.cues = 3
    config.relay_ladder.gap = 3
    config.relay_ladder.delay = 20
    config.relay_ladder.decay = 0.99
    config.relay_ladder.batch = 64
    config.relay_ladder.test_size = 1000
    config.relay_ladder.distractors = True
    config.relay_ladder.bias_scale = 0.5
    return config
