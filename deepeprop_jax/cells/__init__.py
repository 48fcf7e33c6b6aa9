"""Cells that the field uses and Flax lacks: each constructor returns a ``Cell``. Surrogate derivatives of spikes."""

from deepeprop_jax.cells.elstm import elstm
from deepeprop_jax.cells.feedback import feedback_dense
from deepeprop_jax.cells.lru import lru
from deepeprop_jax.cells.rate import indrnn, leaky_readout, leaky_rnn, low_pass
from deepeprop_jax.cells.rtu import rtu
from deepeprop_jax.cells.spiking import alif, lif
from deepeprop_jax.cells.surrogates import (
    ArcTan,
    Exponential,
    Sigmoid,
    StraightThrough,
    SuperSpike,
    Triangular,
    spike,
    triangular_spike,
)

__all__ = [
    "ArcTan",
    "Exponential",
    "Sigmoid",
    "StraightThrough",
    "SuperSpike",
    "Triangular",
    "alif",
    "elstm",
    "feedback_dense",
    "indrnn",
    "leaky_readout",
    "leaky_rnn",
    "lif",
    "low_pass",
    "lru",
    "rtu",
    "spike",
    "triangular_spike",
]
