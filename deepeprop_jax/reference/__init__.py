"""Independent references, in plain JAX: nothing here knows of traces, and nothing here is used by the learner.

* ``bptt``, ``checkpointed_bptt``, ``truncated_bptt``, ``forward_rtrl``: gradients through the whole sequence;
  ``windowed_bptt`` of a loss that sees several steps together.
* ``stop_gradient_oracle``, ``segment_oracle``, ``localised``: what deep e-prop, hops and exact credit inside segments
  are, as BPTT with ``stop_gradient`` put in.
* ``projected_bptt``: BPTT whose cotangents pass boundaries between segments along a few directions alone.
* ``paper_recursion``: the paper's equations 7 to 11, typed literally, for small networks.
"""

from deepeprop_jax.reference.backpropagation import (
    LossFn,
    Pair,
    Run,
    bptt,
    checkpointed_bptt,
    forward_rtrl,
    is_differentiable,
    truncated_bptt,
    windowed_bptt,
)
from deepeprop_jax.reference.paper import Recursion, paper_recursion
from deepeprop_jax.reference.projection import projected_bptt
from deepeprop_jax.reference.stop_gradient import localised, segment_oracle, stop_gradient_oracle

__all__ = [
    "LossFn",
    "Pair",
    "Recursion",
    "Run",
    "bptt",
    "checkpointed_bptt",
    "forward_rtrl",
    "is_differentiable",
    "localised",
    "paper_recursion",
    "projected_bptt",
    "segment_oracle",
    "stop_gradient_oracle",
    "truncated_bptt",
    "windowed_bptt",
]
