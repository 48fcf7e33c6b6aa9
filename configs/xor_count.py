"""XOR-count: credit through depth and time at once."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "xor_count"
    config.xor_count = ml_collections.ConfigDict()
    config.xor_count.features = 16
    config.xor_count.width = 8
    config.xor_count.cues = 5
    config.xor_count.gap = 3
    config.xor_count.delay = 10
    config.xor_count.decay = 0.99
    config.xor_count.batch = 64
    config.xor_count.test_size = 1000
    config.xor_count.distractors = False
    config.xor_count.running = False
    # Layers from the detector to the integrator; of the detector its memory, its initial biases and whether silence
    # gives 0; of the integrator the angle by which its units mix.
    config.xor_count.depth = 2
    config.xor_count.memory = 0.0
    config.xor_count.bias_scale = 0.0
    config.xor_count.from_rest = False
    config.xor_count.angle = 0.0
    return config
