"""The learner: its contract, and the pure functions that keep it."""

from deepeprop_jax.learner.contract import (
    Gradient,
    Init,
    LearnerState,
    OnlineLearner,
    Pending,
    Reset,
    RunSequence,
    Step,
    ValueAndGrad,
)

__all__ = [
    "Gradient",
    "Init",
    "LearnerState",
    "OnlineLearner",
    "Pending",
    "Reset",
    "RunSequence",
    "Step",
    "ValueAndGrad",
]
