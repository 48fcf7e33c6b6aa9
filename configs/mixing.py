"""XOR-count with a memory whose units mix: the limit of deep e-prop."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "mixing"
    config.learning_rate = 3e-3
    config.batches = 1500
    config.evaluate_every = 50
    config.checkpoint_every = 250
    config.mixing = ml_collections.ConfigDict()
    config.mixing.features = 16
    config.mixing.angle = 0.5
    config.mixing.width = 8
    config.mixing.cues = 3
    config.mixing.gap = 3
    config.mixing.delay = 20
    config.mixing.decay = 0.99
    config.mixing.batch = 64
    config.mixing.test_size = 1000
    config.mixing.distractors = True
    config.mixing.bias_scale = 0.5
    return config
