"""Evidence accumulation: spiking neurons that adapt, one layer."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "evidence"
    config.learning_rate = 5e-3
    config.batches = 400
    config.evaluate_every = 25
    config.checkpoint_every = 100
    config.evidence = ml_collections.ConfigDict()
    config.evidence.cells = "ALIF"
    config.evidence.features = 50
    config.evidence.cues = 7
    config.evidence.delay = 105
    config.evidence.recall = 15
    config.evidence.batch = 64
    config.evidence.test_size = 512
    return config
