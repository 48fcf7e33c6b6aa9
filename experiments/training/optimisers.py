"""The optimisers by name, one line each in ``OPTIMISERS``; the keyword arguments of each are its options."""

from __future__ import annotations

from collections.abc import Callable

import optax


def sgd(learning_rate: optax.ScalarOrSchedule, *, clip: float = 1.0) -> optax.GradientTransformation:
    """Plain gradient descent, the gradient's norm held at ``clip`` or below."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.sgd(learning_rate))


OPTIMISERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": lambda learning_rate: optax.adam(learning_rate),
    "sgd": sgd,
    "rmsprop": lambda learning_rate: optax.rmsprop(learning_rate),
}
