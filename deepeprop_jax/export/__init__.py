"""Trained networks for other programs: graphs of the Neuromorphic Intermediate Representation (NIR)."""

from deepeprop_jax.export.to_nir import to_nir

__all__ = ["to_nir"]
