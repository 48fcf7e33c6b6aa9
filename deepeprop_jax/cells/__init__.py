"""Cells that the field uses and Flax lacks; each constructor returns a ``Cell``."""

from deepeprop_jax.cells.lru import lru
from deepeprop_jax.cells.rate import indrnn, leaky_readout, leaky_rnn
from deepeprop_jax.cells.spiking import alif, lif, triangular_spike

__all__ = ["alif", "indrnn", "leaky_readout", "leaky_rnn", "lif", "lru", "triangular_spike"]
