"""The wait of the next change of a chunk's states for a checkpoint that reads them."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from parallel.storage.transfer import CopyEvent

Waiting = Callable[[], AbstractContextManager[None]]


class SaveGuard:
    """Holds back whatever changes the states of a chunk until a checkpoint has them.

    It is released once: where states are copied, when the copies have been launched, and a device waits for these; else
    when the states have been written to files. `waiting` returns a context for the time that the host waits.
    """

    def __init__(self, waiting: Waiting = nullcontext) -> None:
        self._waiting, self._copied = waiting, CopyEvent()
        self._released = threading.Event()

    @property
    def is_released(self) -> bool:
        """True if nothing waits any more, but for a device that waits for its copies."""
        return self._released.is_set()

    def release(self, copied: CopyEvent | None = None) -> None:
        """Let changes begin after `copied`, or at once. Another call changes nothing."""
        if not self.is_released:
            self._copied = copied or CopyEvent()
            self._released.set()

    def wait(self) -> None:
        """Return when the states may be changed: on a device, by work that its current stream is given from now on."""
        if not self.is_released:
            with self._waiting():
                self._released.wait()
        self._copied.wait()


def released() -> SaveGuard:
    """Return the guard of states that no checkpoint reads."""
    guard = SaveGuard()
    guard.release()
    return guard
