"""What the traces of low rank in a learner's state have lost."""

from __future__ import annotations

import jax

from deepeprop_jax.learner.contract import LearnerState
from deepeprop_jax.traces.low_rank import LowRank, relative_error
from deepeprop_jax.traces.projected import NAME, ProjectedCarry


def trace_error(state: LearnerState) -> dict[str, jax.Array]:
    """What the traces of a learner with ``rank=R`` have lost, everything since their start included.

    Args:
      state: a ``LearnerState``.

    Returns:
      Per trace of low rank, by its name in the state, (batch,) estimates of the relative error ‖S - S_R‖ / ‖S‖ in the
      Frobenius norm, (L, batch) where a node has depth; of a projected carry with ``carry_factor=q`` that of V. Nothing
      for a learner with neither.

    Source: for random signs w, E‖X w‖² = ‖X‖² (Hutchinson 1990). The state carries S times fixed signs, exactly; they
    are independent of what the trace keeps. Cost: O(R (K N + M)) per example.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> from deepeprop_jax import deep_eprop
    >>> learner = deep_eprop(nn.GRUCell(features=8), rank=2)
    >>> xs = jax.random.normal(jax.random.key(1), (12, 3, 4), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(0), xs[0])
    >>> run = jax.jit(learner.value_and_grad(lambda y, target: jnp.sum(y**2), segment_length=4))
    >>> (_, state), _ = run(params, learner.init(params, carry, xs[0]), xs, jnp.zeros(12))
    >>> {name: error.shape for name, error in trace_error(state).items()}
    {'cell <- cell, low rank': (3,)}
    """
    found = {name: trace for name, trace in state.traces.items() if isinstance(trace, LowRank)}
    for trace in state.traces.values():
        if isinstance(trace, ProjectedCarry):
            found |= {f"{NAME}, {name}": part for name, part in trace.factored.items()}
    return {name: relative_error(trace) for name, trace in found.items()}
