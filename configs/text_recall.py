"""What was said of a letter, many characters of text ago? A GRU layer below a linear memory."""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

from configs.common import training


def get_config() -> ml_collections.ConfigDict:
    config = training()
    config.task = "text_recall"
    config.batches = 1000
    config.evaluate_every = 100
    config.checkpoint_every = 500
    config.text_recall = ml_collections.ConfigDict()
    # A text file in UTF-8; None: the documentation that Python carries.
    config.text_recall.path = config_dict.placeholder(str)
    config.text_recall.size = 96
    config.text_recall.features = 32
    config.text_recall.pairs = 1
    config.text_recall.gap = 32
    config.text_recall.decay = 0.99
    config.text_recall.batch = 64
    config.text_recall.test_size = 1000
    return config
