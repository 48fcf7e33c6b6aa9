"""Train deep recurrent networks forward in time: deep e-prop and exact RTRL for unmodified recurrent cells."""

from importlib import metadata

from deepeprop_jax.analyse import analyse
from deepeprop_jax.cell import Cell
from deepeprop_jax.compare import compare_to_bptt
from deepeprop_jax.flax_linen import linen_cell
from deepeprop_jax.flax_nnx import nnx_cell
from deepeprop_jax.flax_params import params_from_linen, params_from_nnx, params_to_linen, params_to_nnx
from deepeprop_jax.hoisted import hoisted_bptt
from deepeprop_jax.learner import LearnerState, OnlineLearner
from deepeprop_jax.low_rank import trace_error
from deepeprop_jax.network import graph, stack
from deepeprop_jax.transform import deep_eprop

try:
    __version__ = metadata.version("deepeprop_jax")
except metadata.PackageNotFoundError:  # a clone on the path, not installed
    __version__ = "unknown"

__all__ = [
    "Cell",
    "LearnerState",
    "OnlineLearner",
    "analyse",
    "compare_to_bptt",
    "deep_eprop",
    "graph",
    "hoisted_bptt",
    "linen_cell",
    "nnx_cell",
    "params_from_linen",
    "params_from_nnx",
    "params_to_linen",
    "params_to_nnx",
    "stack",
    "trace_error",
]
