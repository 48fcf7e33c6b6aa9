"""Handwritten digits by rows, two GRU layers."""

from __future__ import annotations

import ml_collections

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "digits"
    config.learning_rate = 2e-2
    config.batches = 700
    config.checkpoint_every = 350
    config.digits = ml_collections.ConfigDict()
    config.digits.cell = "GRUCell"
    config.digits.layers = 2
    config.digits.features = 16
    config.digits.pixels_per_step = 8
    config.digits.blank = 8
    config.digits.batch = 16
    return config
