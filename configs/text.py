"""Characters of a text, two GRU layers: carry and traces go on over the whole text."""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "text"
    config.learning_rate = 1e-2
    config.batches = 2000
    config.evaluate_every = 200
    config.checkpoint_every = 1000
    config.text = ml_collections.ConfigDict()
    # A text file in UTF-8; None: the documentation that Python carries.
    config.text.path = config_dict.placeholder(str)
    config.text.size = 96
    config.text.cell = "GRUCell"
    config.text.layers = 2
    config.text.features = 24
    config.text.batch = 8
    config.text.steps = 32
    return config
