"""The last line of a process that ends because a rank was lost, and what else is done then."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NoReturn, TypeAlias

from parallel.errors import ExitCode, LostRankError, with_short_words
from parallel.watch.terminal import print_line, show_cursor

SECONDS_FOR_A_HOOK = 2.0
"""The seconds that what was registered with `at_end` may take, before the process ends all the same."""

Speaker: TypeAlias = Literal["every", "first", "launcher"]


def end_now(code: int) -> NoReturn:
    """End this process with this exit code, without waiting for anything but the streams that it has written to."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    if code == ExitCode.LOST:  # the program has not come to end its progress bar
        show_cursor()
    os._exit(code)


class LastLine:
    """Prints why this rank ends, once, and calls `on_end` before the process does.

    `speaker` prints a verdict: every rank, the first one that is not lost, or the launcher. `lost` are the ranks that
    are lost, as far as this rank knows.
    """

    def __init__(self, rank: int, size: int, speaker: Speaker) -> None:
        self.rank, self.size, self.speaker = rank, size, speaker
        self.lost: tuple[int, ...] = ()
        self.on_end: Callable[[LostRankError], None] | None = None
        self.one_at_a_time = threading.RLock()  # two threads may learn of a loss at once, and each end the process
        self._has_told = False

    def tell(self, text: str, code: int) -> None:
        """Print a line, where that falls to this rank, and unless it has printed why it ends.

        A rank that ended with another code than LOST has printed why itself, where one rank prints it for all.
        """
        first = next((rank for rank in range(self.size) if rank not in self.lost), 0)
        prints = self.speaker == "every" or (self.speaker == "first" and self.rank == first and code == ExitCode.LOST)
        with self.one_at_a_time:
            if prints and not self._has_told:
                print_line(with_short_words(text))
            self._has_told = True

    def call_hook(self, error: LostRankError) -> None:
        """Call what was registered for the end, in a thread of its own: it may fail or block, and the process ends."""
        hook, self.on_end = self.on_end, None
        if hook is None:
            return
        thread = threading.Thread(target=_called_quietly, args=(hook, error), daemon=True)
        with suppress(RuntimeError):  # the interpreter ends, and starts no thread
            thread.start()
            thread.join(SECONDS_FOR_A_HOOK)


def _called_quietly(hook: Callable[[LostRankError], None], error: LostRankError) -> None:
    with suppress(BaseException):
        hook(error)
