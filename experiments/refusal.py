"""What a configuration or a command line gets wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class Refused(ValueError):
    """What cannot be run: what was seen, what is possible."""


def check_name(what: str, seen: Any, possible: Iterable[str]) -> None:
    """One of the possible names.

    Raises:
      Refused: with the nearest one, whatever its capitals.
    """
    possible = list(possible)
    if seen not in possible:
        small = {name.lower(): name for name in possible}
        near = difflib.get_close_matches(str(seen).lower(), small, n=1, cutoff=0.4)
        hint = f" Did you mean {small[near[0]]!r}?" if near else ""
        raise Refused(f"No {what} is called {seen!r}.{hint} Possible: {', '.join(possible)}.")
