"""``python -m experiments.distributed``: ``train`` says what it does."""

import sys

from experiments.distributed.train import main
from experiments.program.command import keep_compiled

if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
