"""Arguments that several commands have, and the parser that reads them.

Nothing here imports torch, which takes seconds.
"""

import argparse
import os
import re
import sys
from typing import NoReturn

from colonnade.process import REFUSED


class Parser(argparse.ArgumentParser):
    """An argument parser that prints what is wrong on rank 0 alone, where torchrun has started several ranks."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            super().error(message)
        sys.exit(REFUSED)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a config and change its keys."""
    parser.add_argument("--config", metavar="FILE", help="the config, a Python file of dicts or a run's config.json")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change keys of the config, as in --set train.steps=20 parallel.pipeline=2; a later value of a key wins",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the checkpoint from which a run continues."""
    parser.add_argument(
        "--resume",
        metavar="auto|DIR",
        help="continue from a checkpoint: auto is the newest one of this run, DIR is a checkpoint or a run's folder."
        " The layout may be another one",
    )


def count(text: str) -> int:
    """Return a number of processes, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def step_range(text: str) -> range:
    """Return the steps of A:B, B not included: '10:13' -> range(10, 13)."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B; 10:13 traces steps 10, 11 and 12")
    first, stop = int(found[1]), int(found[2])
    if not 1 <= first < stop:
        valid = f"{max(1, first)}:{max(2, first + 1, stop)}"
        raise argparse.ArgumentTypeError(
            f"{text} needs 1 <= A < B: steps count from 1, and B is not included. Try {valid}"
        )
    return range(first, stop)
