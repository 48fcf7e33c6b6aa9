"""A gradient beside that of BPTT: the one cosine, the one relative error and the one ratio of norms of all programs."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

PyTree = Any


def compare(found: PyTree, reference: PyTree) -> dict[str, float | None]:
    """A layer's gradient g beside that of BPTT, r, each as one vector of real numbers; None where undefined.

    cosine = ⟨g, r⟩ / (‖g‖ ‖r‖), relative_error = ‖g − r‖ / ‖r‖, norm_ratio = ‖g‖ / ‖r‖
    """
    g, r = _vector(found), _vector(reference)
    norm_g, norm_r = (float(np.linalg.norm(vector)) for vector in (g, r))
    return {
        "cosine": quotient(float(g @ r), norm_g * norm_r),
        "relative_error": quotient(float(np.linalg.norm(g - r)), norm_r),
        "norm_ratio": quotient(norm_g, norm_r),
    }


def compare_layers(found: PyTree, reference: PyTree) -> list[dict[str, float | None]]:
    """``compare`` of each layer of a stack, from bottom to top."""
    return [compare(*pair) for pair in zip(found, reference, strict=True)]


def quotient(above: float, below: float) -> float | None:
    """None where it is not a finite number."""
    value = above / below if below > 0 else math.nan
    return value if math.isfinite(value) else None


def _vector(tree: PyTree) -> np.ndarray:
    """All leaves in float64, a complex number as two."""
    parts = [np.zeros(0)]
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        real_parts = (leaf.real, leaf.imag) if np.iscomplexobj(leaf) else (leaf,)
        parts += [part.astype(np.float64).ravel() for part in real_parts]
    return np.concatenate(parts)
