"""Train a language model as a config file says.

    python launch.py                                       one process, the built-in config: a small model
    python launch.py --config FILE --check                 show how a config is laid out, without starting it
    python launch.py --config FILE --nprocs 8              eight processes on this host
    torchrun --nproc-per-node 8 launch.py --config FILE    the same eight, started by torchrun

The files in configs/ are examples, and docs/config.md lists every key. README.md lists the files that a run leaves.
This is `colonnade train` of a clone, where nothing is installed.
"""

import argparse
import sys
from collections.abc import Sequence

from colonnade.arguments import Parser
from colonnade.train import add_arguments, check_arguments, main

__all__ = ["main", "read_arguments"]


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line. Exits with code 2 if they make no sense."""
    parser = Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        check_arguments(arguments)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    sys.exit(main(read_arguments()))
