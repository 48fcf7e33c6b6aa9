"""Every field of a training configuration, with the values that a task's file need not repeat."""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict


def training() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    # The task's name, and by that name its options.
    config.task = config_dict.placeholder(str)
    config.seed = 0

    config.rule = "deep e-prop"
    # Steps per move of the traces, and directions that a trace keeps; None: the rule's own choice.
    config.segment_length = config_dict.placeholder(int)
    config.rank = config_dict.placeholder(int)

    config.optimiser = "adam"
    config.learning_rate = 1e-2
    # To zero over all updates.
    config.cosine_decay = True
    # Of the whole gradient's norm; None: the optimiser's own choice.
    config.clip = config_dict.placeholder(float)
    # Steps between two updates inside a sequence, with the traces kept; None: one update, at its end.
    config.update_every = config_dict.placeholder(int)

    # Whether the error of the gradient against BPTT's is measured beside it, in metrics, curves and the progress bar.
    config.meter = False

    # Training batches in all, between two lines of metrics, and between two checkpoints.
    config.batches = 800
    config.evaluate_every = 50
    config.checkpoint_every = 200
    return config
