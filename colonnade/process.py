"""The end of a command: its exit codes, and the signals and missing packages that end it early."""

import gc
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED, FAILED, REFUSED, NOT_FINITE = 130, 143, 1, 2, 4  # exit codes


def guarded(work: Callable[[], int]) -> int:
    """Return the exit code of `work`, or that of Ctrl-C. Its standard output may be closed, or write ASCII alone."""
    from training.streams import safe_output

    try:
        with safe_output():
            return work()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End the process, as a handler of SIGTERM: what is open is closed, and what is incomplete is removed."""
    sys.exit(TERMINATED)


def import_torch() -> bool:
    """Import torch, and exempt its objects from garbage collection. Return False, with a message, where it is missing.

    There are 170,000, and they stay until the process ends: every full collection, also the one at exit, would spend
    0.07 s on them. A process that has imported torch before, as tests have, exempts nothing.
    """
    if "torch" not in sys.modules:
        try:
            import torch  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            print("torch is not installed in this Python: run `. .venv/bin/activate`, or make venv.", file=sys.stderr)
            return False
        gc.freeze()
    return True
