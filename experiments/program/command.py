"""What all programs have in common: their help, the names that they know, and that compiled programs are kept.

JAX is imported where it is needed: the benchmarks fix the number of threads before that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from experiments.program.refusal import Refused, check_name

COMPILED = Path("results") / "compiled"
"""Where compiled programs are kept, unless JAX_COMPILATION_CACHE_DIR names another folder."""


class Parser(argparse.ArgumentParser):
    """Of one program: ``--help`` shows its whole documentation; what it does not know is refused with the nearest name.

    Args:
      program: the module that is run, such as "experiments.sweeps".
      documentation: of that module.
    """

    def __init__(self, program: str, documentation: str) -> None:
        super().__init__(
            prog=f"python -m {program}",
            description=documentation,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """As usual; exits with status 2 for an argument that the program does not know."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return options

    def _refuse(self, seen: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        reason = f"Seen {seen!r}, one argument too many. Possible: {', '.join(known)}."
        if seen.startswith("-"):
            try:
                check_name("option", seen.split("=")[0], known)
            except Refused as error:
                reason = str(error)
        self.error(reason)


def one_of(what: str, possible: Iterable[str]) -> Callable[[str], str]:
    """The type of an argument that is a name, as ``add_argument`` takes it; another one is refused with the nearest."""
    possible = list(possible)

    def checked(seen: str) -> str:
        try:
            check_name(what, seen, possible)
        except Refused as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return seen

    return checked


def keep_compiled() -> None:
    """Keep compiled programs in ``COMPILED`` for the next process; the user's own JAX_COMPILATION_CACHE_DIR wins.

    For a program's own start, not for what others import: a setting of the whole process. Not for programs that measure
    how long compiling takes.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))
