"""Recordings of many channels (JapaneseVowels, or BasicMotions), two GRU layers."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "series"
    config.learning_rate = 1e-2
    config.batches = 600
    config.checkpoint_every = 300
    config.series = ml_collections.ConfigDict()
    config.series.name = "JapaneseVowels"
    config.series.cell = "GRUCell"
    config.series.layers = 2
    config.series.features = 16
    config.series.batch = 16
    return config
