"""Cells that the field uses and Flax lacks; each constructor returns a ``Cell``."""

from deepeprop_jax.cells.alif import alif
from deepeprop_jax.cells.indrnn import indrnn
from deepeprop_jax.cells.leaky_readout import leaky_readout
from deepeprop_jax.cells.leaky_rnn import leaky_rnn
from deepeprop_jax.cells.lif import lif
from deepeprop_jax.cells.lru import lru
from deepeprop_jax.cells.spike import triangular_spike

__all__ = ["alif", "indrnn", "leaky_readout", "leaky_rnn", "lif", "lru", "triangular_spike"]
