"""NEST's regression experiment by e-prop (Bellec et al. 2020): its five reference losses, out of cells and signals.

A recurrent layer of 100 LIF units is to draw a sum of four sines. Its learning signal comes by random feedback, its
rate is regularised. The figures are those of NEST's own test of its e-prop neurons.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax import Feedback, deep_eprop, graph
from deepeprop_jax.cells import lif, low_pass
from deepeprop_jax.losses import rate_regularisation

STEPS, UNITS = 1000, 100
NEST = [101.964356999041, 103.466731126205, 103.340607074771, 103.680244037686, 104.412775748752]


def experiment():
    """Parameters, feedback weights, inputs (T, 1, 100) and target (T, 1), as NEST draws them."""
    random = np.random.RandomState(1)
    weights = [random.randn(UNITS, size).T / 10 for size in (UNITS, UNITS, 1)] + [random.randn(UNITS, 1) / 10]
    w_in, w_rec, w_out, feedback = (np.asarray(w, np.float32).astype(np.float64) for w in weights)
    np.fill_diagonal(w_rec, 0)
    x = (random.rand(STEPS, UNITS) < 0.05).astype(np.float64)
    x[0] = 0
    amplitude, phase = random.uniform(0.5, 2, 4), random.uniform(0, 2 * np.pi, 4)
    periods = zip(amplitude, phase, (1000, 500, 333, 200), strict=True)
    s = sum(a * np.sin(np.linspace(p, p + 2 * np.pi * (STEPS // period), STEPS)) for a, p, period in periods)
    s = (s - s[0]) / np.abs(s - s[0]).max()
    params = {
        "hidden": {"input_kernel": w_in.T, "recurrent_kernel": w_rec.T},
        "filter": {},
        "mean": (),
        "readout": w_out.T,
    }
    return jax.tree.map(jnp.asarray, (params, feedback.T, x[:, None], s[:, None]))


def loss_fn(y, target):
    """Half the squared error; at the last step also that of the units' mean rates, which is not in the printed loss."""
    printed = 0.5 * jnp.sum((y["readout"][:, 0] - target["value"]) ** 2)
    rates = target["last"] * 300 * rate_regularisation(y["mean"], 0.01)
    return printed + rates, printed


def test_the_losses_of_nest():
    params, feedback, xs, wanted = experiment()
    hidden = lif(UNITS, tau=30.0, threshold=0.03, low_pass=True, detach_reset=True, param_dtype=jnp.float64)
    network = graph(
        {
            "hidden": (hidden, "input"),
            "filter": (low_pass(tau=30.0), "hidden"),
            "readout": (lambda kernel, carry, x: (carry, x @ kernel), "filter"),
            "mean": (lambda _, mean, z: (mean + z / STEPS,) * 2, "hidden"),
        },
        outputs=("readout", "mean"),
    )
    zeros = jnp.zeros((1, UNITS))
    carry = {"hidden": (zeros, zeros), "filter": zeros, "readout": (), "mean": zeros}
    learner = deep_eprop(network, signals=("filter",))
    signals = {"filter": Feedback(feedback, of="readout")}
    run = jax.jit(learner.value_and_grad(loss_fn, has_aux=True, signals=signals))
    targets = {"value": wanted, "last": jnp.eye(STEPS)[-1]}
    state, printed = learner.init(params, carry, xs[0]), []
    for _ in NEST:
        ((_, losses), _), grads = run(params, state, xs, targets)
        printed.append(losses.sum())
        params = jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)
    np.testing.assert_allclose(printed, NEST, rtol=1e-12)
