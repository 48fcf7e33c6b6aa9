"""The package nir, an extra, and what all that uses it asks of its arguments."""

from __future__ import annotations

from types import ModuleType

INTEGRATIONS = ("euler", "exponential")


def nir_package(caller: str, dt: float, integration: str) -> ModuleType:
    """The package.

    Raises:
      ImportError: it is not installed.
      ValueError: ``dt`` that is not above 0; another ``integration``.
    """
    if not dt > 0:
        raise ValueError(f"dt is the length of a step, above 0, in the unit of NIR's τ; seen {dt!r}.")
    if integration not in INTEGRATIONS:
        raise ValueError(f"integration is one of {', '.join(map(repr, INTEGRATIONS))}; seen {integration!r}.")
    try:
        import nir
    except ImportError as error:
        raise ImportError(
            f"{caller} needs the package nir, the extra 'nir' of deepeprop_jax: pip install nir."
        ) from error
    return nir
