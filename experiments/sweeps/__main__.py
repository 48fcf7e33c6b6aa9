"""``python -m experiments.sweeps``: ``sweep`` says what it does."""

import sys

from experiments.program.command import keep_compiled
from experiments.sweeps.sweep import main

if __name__ == "__main__":
    keep_compiled()  # the seeds of one setting are one program
    sys.exit(main())
