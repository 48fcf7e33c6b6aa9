"""``python -m experiments.demo``: ``demo`` says what it does."""

import os
import sys

from experiments.demo.demo import main
from experiments.program.command import keep_compiled

if __name__ == "__main__":
    keep_compiled()
    status = main()
    sys.stdout.flush()
    # Threads may still be compiling for a demo that was interrupted; there is nothing left to wait for.
    os._exit(status)
