"""``python -m experiments.training``: ``train`` says what it does."""

import sys

from experiments.program.command import keep_compiled
from experiments.training.train import main

if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
