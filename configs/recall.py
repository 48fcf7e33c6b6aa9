"""Delayed recall, two GRU layers: a loss at many steps."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "recall"
    config.learning_rate = 3e-3
    config.batches = 1000
    config.evaluate_every = 100
    config.checkpoint_every = 500
    config.recall = ml_collections.ConfigDict()
    config.recall.cell = "GRUCell"
    config.recall.layers = 2
    config.recall.features = 32
    config.recall.bits = 7
    config.recall.length = 20
    config.recall.pad = 7
    config.recall.batch = 32
    config.recall.test_size = 500
    return config
