"""``python -m experiments.rl``: ``run`` says what it does."""

import sys

from experiments.program.command import keep_compiled
from experiments.rl.run import main

if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
