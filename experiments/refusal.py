"""What a configuration gets wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class Refused(ValueError):
    """A configuration that cannot be run: what was seen, what is possible."""


def check_name(what: str, seen: Any, possible: Iterable[str]) -> None:
    """One of the possible names.

    Raises:
      Refused: with the nearest one.
    """
    possible = list(possible)
    if seen not in possible:
        near = difflib.get_close_matches(str(seen), possible, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Refused(f"No {what} is called {seen!r}.{hint} Possible: {', '.join(possible)}.")
