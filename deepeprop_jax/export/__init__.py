"""Networks for other programs, and from them: graphs of the Neuromorphic Intermediate Representation (NIR)."""

from deepeprop_jax.export.from_nir import from_nir
from deepeprop_jax.export.to_nir import to_nir

__all__ = ["from_nir", "to_nir"]
