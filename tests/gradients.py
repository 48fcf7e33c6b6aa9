"""Compare gradients leaf by leaf, by norm; the tolerances of the whole suite, each with its reason."""

from __future__ import annotations

from typing import Any

import chex
import jax
import numpy as np

FLOAT64 = 1e-9
"""Exact claims in float64. Seen: below 1e-13; the rest is room for longer sums, far from any real fault."""

FLOAT32 = 2e-5
"""Exact claims in float32: rounding of 2^-24 over sums of some hundred terms."""

SAME = 1e-12
"""Two ways through the same arithmetic in float64, in another order."""


def relative_errors(seen: Any, needed: Any) -> dict[str, float]:
    """Per leaf |seen - needed| / max(|needed|, 1e-12 x the norm of the whole gradient)."""
    pairs = list(zip(jax.tree.leaves_with_path(needed), jax.tree.leaves(seen), strict=True))
    arrays = [
        (jax.tree_util.keystr(path), _numbers(leaf), _numbers(other))
        for (path, leaf), other in pairs
        if leaf.dtype != jax.dtypes.float0
    ]
    whole = np.sqrt(sum(float(np.sum(np.abs(leaf.astype(complex)) ** 2)) for _, leaf, _ in arrays))
    return {
        name: float(np.linalg.norm(other - leaf) / max(np.linalg.norm(leaf), 1e-12 * whole, 1e-300))
        for name, leaf, other in arrays
    }


def _numbers(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same_gradient(seen: Any, needed: Any, tolerance: float, where: str = "") -> None:
    """Every leaf within tolerance, and of the same dtype and structure."""
    chex.assert_trees_all_equal_shapes_and_dtypes(seen, needed)
    wrong = {name: error for name, error in relative_errors(seen, needed).items() if not error < tolerance}
    assert not wrong, f"{where}: {wrong}"
