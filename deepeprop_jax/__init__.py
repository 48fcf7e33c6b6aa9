"""Train deep recurrent networks forward in time: deep e-prop and exact RTRL for unmodified recurrent cells."""

from importlib import metadata

from deepeprop_jax.learner.basis import BasisLearner, CarryBasis, Observed, with_basis
from deepeprop_jax.learner.carry_basis import carry_basis
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner
from deepeprop_jax.learner.data_parallel import data_parallel
from deepeprop_jax.learner.deep_eprop import deep_eprop
from deepeprop_jax.learner.error_meter import Error, ErrorMeter, Meter, error_meter
from deepeprop_jax.learner.feedback import (
    Feedback,
    random_feedback,
    sign_feedback,
    symmetric_feedback,
    third_factor,
)
from deepeprop_jax.learner.hoisted_bptt import hoisted_bptt
from deepeprop_jax.network.build import graph, stack
from deepeprop_jax.network.cell import Cell
from deepeprop_jax.network.flax_params import params_from_linen, params_from_nnx, params_to_linen, params_to_nnx
from deepeprop_jax.network.linen import linen_cell
from deepeprop_jax.network.nnx import nnx_cell
from deepeprop_jax.network.outputs import carry_of
from deepeprop_jax.report.analyse import analyse
from deepeprop_jax.report.compare import compare_to_bptt
from deepeprop_jax.report.eligibility import eligibility
from deepeprop_jax.report.suggest_rank import suggest_rank
from deepeprop_jax.report.trace_error import trace_error
from deepeprop_jax.streams.eligibility_trace import EligibilityTraceState, eligibility_trace

try:
    __version__ = metadata.version("deepeprop_jax")
except metadata.PackageNotFoundError:  # a clone on the path, not installed
    __version__ = "unknown"

__all__ = [
    "BasisLearner",
    "CarryBasis",
    "Cell",
    "EligibilityTraceState",
    "Error",
    "ErrorMeter",
    "Feedback",
    "LearnerState",
    "Meter",
    "Observed",
    "OnlineLearner",
    "analyse",
    "carry_basis",
    "carry_of",
    "compare_to_bptt",
    "data_parallel",
    "deep_eprop",
    "eligibility",
    "eligibility_trace",
    "error_meter",
    "graph",
    "hoisted_bptt",
    "linen_cell",
    "nnx_cell",
    "params_from_linen",
    "params_from_nnx",
    "params_to_linen",
    "params_to_nnx",
    "random_feedback",
    "sign_feedback",
    "stack",
    "suggest_rank",
    "symmetric_feedback",
    "third_factor",
    "trace_error",
    "with_basis",
]
