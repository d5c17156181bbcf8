"""Show how a config is laid out, without starting it, as `colonnade train --check` does.

    colonnade check --config FILE              in the smallest world that holds the model
    colonnade check --config FILE --world N    in a world of N processes

It prints the layout, the bytes on each rank, and the timeline of a pipeline.
"""

import argparse

from colonnade import train
from colonnade.arguments import add_config, add_resume, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a check."""
    add_config(parser)
    add_resume(parser)
    parser.add_argument(
        "--world", metavar="N", type=count, help="the number of processes (default: the fewest that fit)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the layout, the memory of each rank and the timeline, and return the exit code."""
    return train.main(argparse.Namespace(**vars(arguments), check=True, nprocs=None, profile=range(0)))
