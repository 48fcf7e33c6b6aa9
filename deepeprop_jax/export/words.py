"""How each cell is said in NIR's words: one function per constructor.

Reference: J. E. Pedersen et al., "Neuromorphic intermediate representation: A unified instruction set for interoperable
brain-inspired computing", Nature Communications 15, 8122 (2024), Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deepeprop_jax.cells import alif, feedback_dense, leaky_readout, lif, low_pass
from deepeprop_jax.export.draft import Array, Draft, Leak, Site, refusal


class Written(NamedTuple):
    """What a node became.

    Attributes:
      names: NIR nodes whose outputs sum to its output.
      size: length of its output.
    """

    names: tuple[str, ...]
    size: int


def dense(draft: Draft, site: Site, kernel: Array, bias: Array | None) -> Written:
    """y = x W + b: Affine, or Linear without b."""
    return Written(draft.weigh(site, kernel, bias, end=""), kernel.shape[1])


def _feedback_dense(draft: Draft, site: Site) -> Written:
    """Forward it is a dense layer; the weights of its gradient's way back are for training alone."""
    return dense(draft, site, site.params["kernel"], site.params.get("bias"))


def _leaky_readout(draft: Draft, site: Site) -> Written:
    """y_t = κ y_{t-1} + x_t W + b: Affine; LI."""
    kernel, arguments = site.params["kernel"], site.arguments
    entering = draft.weigh(site, kernel, site.params.get("bias"))
    leak = draft.leak(arguments["tau"], arguments["dt"], arguments["low_pass"])
    return Written((draft.add(site.name, draft.li(leak, kernel.shape[1]), entering),), kernel.shape[1])


def _low_pass(draft: Draft, site: Site) -> Written:
    """y_t = κ y_{t-1} + (1 - κ) x_t: LI with R = 1."""
    entering, size = draft.gather(site)
    leak = draft.leak(site.arguments["tau"], site.arguments["dt"], low_pass=True)
    return Written((draft.add(site.name, draft.li(leak, size), entering),), size)


def _lif(draft: Draft, site: Site) -> Written:
    """With ``reset="zero"``: Linear; LIF. Else Linear; LI; Threshold, and the reset as what spikes send back to LI.

    v_t = α v_{t-1} + (1 - α) R (x_t W_in + z_{t-1} W_rec - threshold / ((1 - α) R) · z_{t-1})
    """
    arguments, kernel = site.arguments, site.params["input_kernel"]
    _refuse_refractory(site)
    size = kernel.shape[1]
    leak = draft.leak(arguments["tau"], arguments["dt"], arguments["low_pass"])
    threshold = draft.full(size, arguments["threshold"])
    entering = draft.weigh(site, kernel)
    if arguments["reset"] == "zero":
        node = draft.nir.LIF(
            tau=draft.full(size, leak.tau),
            r=draft.full(size, leak.r),
            v_leak=draft.full(size, 0),
            v_threshold=threshold,
            v_reset=draft.full(size, 0),
        )
        potential = spikes = draft.add(site.name, node, entering)
    else:
        potential = draft.add(f"{site.name}_potential", draft.li(leak, size), entering)
        spikes = draft.add(site.name, draft.nir.Threshold(threshold), (potential,))
    _send_back(draft, site, spikes, potential, leak, size)
    return Written((spikes,), size)


def _alif(draft: Draft, site: Site) -> Written:
    """``_lif``, and spikes that go to an LI a of their own, whose output, times -β, reaches the Threshold beside v."""
    arguments, kernel = site.arguments, site.params["input_kernel"]
    if arguments["reset"] == "zero":
        raise refusal(
            site.shown,
            "alif with reset='zero': NIR's LIF, which resets to a potential, has a threshold that does not move",
            "Train with reset='subtract' or reset='none'.",
        )
    written, size = _lif(draft, site), kernel.shape[1]
    (spikes,) = written.names
    leak = draft.leak(arguments["tau_adaptation"], arguments["dt"], low_pass=False)
    adaptation = draft.add(f"{site.name}_adaptation", draft.li(leak, size), (spikes,))
    raised = draft.nir.Scale(draft.full(size, -arguments["beta"]))
    draft.connect((draft.add(f"{site.name}_raised", raised, (adaptation,)),), spikes)
    return written


def _send_back(draft: Draft, site: Site, spikes: str, potential: str, leak: Leak, size: int) -> None:
    """The cycle from spikes to potentials, one step later: lateral weights, and the reset by subtraction."""
    lateral = site.params.get("recurrent_kernel")
    subtracted = site.arguments["reset"] == "subtract"
    reset = draft.full(size, site.arguments["threshold"] / leak.inflow if subtracted else 0)
    if lateral is not None:
        others = np.where(np.eye(size, dtype=bool), 0, lateral) - np.diag(reset)
        node = draft.nir.Linear(np.ascontiguousarray(others.T))
    elif subtracted:
        node = draft.nir.Scale(-reset)
    else:
        return
    draft.connect((draft.add(f"{site.name}_recurrent", node, (spikes,)),), potential)


def _refuse_refractory(site: Site) -> None:
    period = site.arguments["refractory"]
    if period:
        raise refusal(
            site.shown,
            f"NIR has no refractory period; seen refractory={period!r}",
            "Train with refractory=0, or write the network for the device by hand.",
        )


WORDS: dict[Callable[..., object], Callable[[Draft, Site], Written]] = {
    lif: _lif,
    alif: _alif,
    leaky_readout: _leaky_readout,
    low_pass: _low_pass,
    feedback_dense: _feedback_dense,
}
"""By the constructor of the cell."""
