"""What every generator asks of its arguments."""

from __future__ import annotations

from typing import Any


def check_at_least(least: int, **values: Any) -> None:
    """Numbers of steps, examples and inputs are integers that are not below ``least``.

    Raises:
      ValueError: with the name of the argument, what was seen and what is needed.
    """
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}; seen {value!r}.")
