"""The end of a command: its exit codes, and the signals and missing packages that end it early."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

REFUSED = 2
"""The exit code of what is refused: `parallel.errors.ExitCode.REFUSED`, without an import of torch."""

STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
"""The signals that ask a process to end, as `parallel.engine.stop_signals` has them."""

SIGNALLED = 128
"""The exit code of a process that ends by a signal is this and the signal's number: 130, 138, 143."""


def guarded(work: Callable[[], int]) -> int:
    """Return the exit code of `work`, or that of a signal that has ended it, with a line on rank 0.

    The standard output of the process may be closed, or write ASCII alone.
    """
    from training.streams import safe_output

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with safe_output():
            return work()
    except KeyboardInterrupt:
        return _end_by(signal.SIGINT)
    except SystemExit as end:
        if not isinstance(end.code, int) or end.code <= SIGNALLED:
            raise
        return _end_by(signal.Signals(end.code - SIGNALLED))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_text(number: signal.Signals) -> str:
    """Return the line with which a process ends at once by a signal."""
    return f"{number.name}: ended at once; nothing was saved"


def _end_by(number: signal.Signals) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(end_text(number), file=sys.stderr)
    return SIGNALLED + number


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End the process, as a handler of a signal: what is open is closed, and what is incomplete is removed."""
    sys.exit(SIGNALLED + number)


def note_stop_signals(*, ends: bool) -> list[int]:
    """Return a list that will have the numbers of the signals that come; `ends`: they end the process at once."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if ends:
            terminate(number, frame)

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a rank of --nprocs begins with them blocked
    return came


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
