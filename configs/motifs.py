"""Classify, then count, two dense leaky layers."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "motifs"
    config.learning_rate = 3e-3
    config.batches = 600
    config.evaluate_every = 50
    config.checkpoint_every = 300
    config.motifs = ml_collections.ConfigDict()
    config.motifs.features = 32
    config.motifs.presentations = 5
    config.motifs.delay = 12
    config.motifs.batch = 64
    config.motifs.test_size = 1000
    return config
