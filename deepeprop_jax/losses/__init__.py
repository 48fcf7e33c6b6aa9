"""Losses on hidden states: terms for a ``loss_fn``, of what ``outputs=`` shows of a network."""

from deepeprop_jax.losses.regularisation import rate_regularisation, voltage_regularisation

__all__ = ["rate_regularisation", "voltage_regularisation"]
