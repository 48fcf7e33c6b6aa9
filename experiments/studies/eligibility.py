"""A picture of eligibility traces: an adaptive spiking unit, and what one of its synapses did to it.

python -m experiments.studies.eligibility
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax import deep_eprop, eligibility
from deepeprop_jax.cells import alif
from experiments.program.command import Parser
from experiments.program.pages import DOCS
from experiments.program.pictures import open_axes, pyplot, save

PICTURE = DOCS / "eligibility.png"
STEPS, INPUTS = 250, 4
BETA, THRESHOLD = 0.3, 1.0


def record() -> dict[str, np.ndarray]:
    """Of one unit over time: potential, threshold, spikes, input spikes of one synapse, its traces."""
    learner = deep_eprop(alif(3, tau=20.0, tau_adaptation=200.0, beta=BETA, threshold=THRESHOLD, recurrent=False))
    rates = np.random.default_rng(0).random((STEPS, 1, INPUTS)) < 0.15
    xs = jnp.asarray(rates, jnp.float32).at[120:].set(0.0)
    params, carry = learner.network.init(jax.random.key(0), xs[0])
    params = {"input_kernel": jnp.abs(params["input_kernel"]) * 0.6}

    @jax.jit
    def step(state, x):
        state, z = learner.step(params, state, x)
        traces = eligibility(learner, params, state, "cell", "input_kernel")
        v, a, _ = state.carry
        seen = {"potential": v[0, 0], "threshold": THRESHOLD + BETA * a[0, 0], "spike": z[0, 0], "input": x[0, 0]}
        return state, seen | {name: trace[0, 0, 0] for name, trace in traces.items()}

    _, seen = jax.lax.scan(step, learner.init(params, carry, xs[0]), xs)
    return {name: np.asarray(values) for name, values in seen.items()}


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    Parser("experiments.studies.eligibility", __doc__).parse_args(arguments)
    seen, time = record(), np.arange(STEPS)
    figure, axes = pyplot.subplots(3, 1, figsize=(7.2, 4.8), sharex=True, layout="constrained")
    axes[0].plot(time, seen["potential"], label="potential v")
    axes[0].plot(time, seen["threshold"], label="threshold A")
    axes[0].vlines(time[seen["spike"] > 0], 3.6, 4.0, color="k", label="spikes")
    axes[0].vlines(time[seen["input"] > 0], -0.6, -0.3, color="C3", label="spikes of one input")
    axes[1].plot(time, seen["0"], color="C0", label="trace on v")
    axes[2].plot(time, seen["1"], color="C1", label="trace on the adaptation a")
    axes[0].set_ylim(-0.9, 6.0)
    axes[2].set_xlabel("step")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
        open_axes(axis)
    save(figure, PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
