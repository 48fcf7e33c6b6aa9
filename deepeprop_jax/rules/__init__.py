"""The paper's neighbours: other rules that learn forward in time, each with the contract of ``deep_eprop``.

Written to be read beside their papers, and to be compared with: docs/rules.md has them in a table.
"""

from deepeprop_jax.rules.immediate import immediate
from deepeprop_jax.rules.kf_rtrl import kf_rtrl
from deepeprop_jax.rules.kronecker_sum import kronecker_sum
from deepeprop_jax.rules.rflo import rflo
from deepeprop_jax.rules.snap import snap
from deepeprop_jax.rules.uoro import uoro

__all__ = ["immediate", "kf_rtrl", "kronecker_sum", "rflo", "snap", "uoro"]
