"""At which commit a result was made."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("deepeprop_jax", "experiments", "configs")


@functools.cache
def commit(root: Path = ROOT) -> str:
    """Of the repository, with "-dirty" where the sources have been changed since; empty without git.

    Found out once by a program, near its start: the code that it runs may be older than a later commit.
    """
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=root)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *SOURCES], capture_output=True, cwd=root)
    except OSError:
        return ""
    return head.stdout.strip() + ("-dirty" if head.returncode == 0 and changes.returncode else "")
