"""`python -m colonnade`, which torchrun can start too: `torchrun -m colonnade train`."""

import sys

from colonnade.cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m colonnade"))
