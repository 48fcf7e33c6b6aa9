"""The recurrent cells by name, one line each in ``CELLS``: made from their number of features alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from deepeprop_jax import cells

CELLS: dict[str, Callable[[int], Any]] = {
    "SimpleCell": nn.SimpleCell,
    "GRUCell": nn.GRUCell,
    "OptimizedLSTMCell": nn.OptimizedLSTMCell,
    "leaky_rnn": cells.leaky_rnn,
    "indrnn": cells.indrnn,
    "lru": lambda features: cells.lru(features, features),
    "lif": cells.lif,
    "alif": cells.alif,
}
