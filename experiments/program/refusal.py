"""What a configuration or a command line gets wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

NEAR = 0.4
"""Likeness, from 0 to 1, from which on a name is offered for another."""


class Refused(ValueError):
    """What cannot be run: what was seen, what is possible."""


def check_name(what: str, seen: Any, possible: Iterable[str]) -> None:
    """One of the possible names.

    Raises:
      Refused: with the nearest one.
    """
    possible = list(possible)
    if seen not in possible:
        near = nearest(str(seen), possible)
        hint = f" Did you mean {near!r}?" if near else ""
        raise Refused(f"No {what} is called {seen!r}.{hint} Possible: {', '.join(possible)}.")


def nearest(seen: str, possible: Iterable[str]) -> str | None:
    """The likest name, capitals aside; one that holds what was seen comes first. None where all are far."""
    word = seen.lower()

    def likeness(name: str) -> tuple[bool, float]:
        return bool(word) and word in name.lower(), difflib.SequenceMatcher(None, name.lower(), word).ratio()

    best = max(possible, key=likeness, default=None)
    return best if best is not None and max(likeness(best)) >= NEAR else None
