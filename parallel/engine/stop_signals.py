"""Signals that ask a run to end: they are noted when they come, and ranks agree on them before they act."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from parallel.engine.base import EngineBase
from parallel.errors import SIGNALLED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SECONDS_OF_ONE = 1.0
"""A signal that comes again within this time is the same one: a terminal and a launcher both send it, for example."""


def code_of(number: int) -> int:
    """Return the exit code of a process that ends by a signal of this number: 130, 138 or 143."""
    return SIGNALLED + number


def end_at_once(number: int) -> NoReturn:
    """End the process: what is open is closed, and what is incomplete is removed."""
    raise SystemExit(code_of(number))


def do_nothing(number: int) -> None:
    """Leave a first signal for later: its number has been noted."""


class StopSignals:
    """Handlers of the signals that ask a run to end.

    `number` is that of the first signal, 0 before one has come; `on_first` is called with it. A second one, which comes
    more than a second later and whose number is `second` then, ends the process at once; any further one is ignored.
    """

    def __init__(self, on_first: Callable[[int], object] = do_nothing) -> None:
        self.number = 0
        self._on_first = on_first
        self.second, self._first_came = 0, 0.0

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Take in a signal, as its handler does."""
        now = time.monotonic()
        if not self.number:
            self.number, self._first_came = number, now
            self._on_first(number)
        elif now - self._first_came > SECONDS_OF_ONE and not self.second:
            self.second = number
            end_at_once(number)

    def tell(self, on_first: Callable[[int], object]) -> None:
        """Call this with the first signal from now on; at once if it has come before."""
        self._on_first = on_first
        if self.number:
            on_first(self.number)

    def install(self) -> None:
        """Make these the handlers of the process; the main thread calls this."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)


def ignore_stop_signals() -> None:
    """Have the process ignore these signals from now on, since it ends already.

    Python removes a handler of its own before a process has ended.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def catch_signals(engine: EngineBase) -> Iterator[None]:
    """Have SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for the end of your loop, while the block runs.

        with parallel.catch_signals(engine):
            for batch in loader:
                engine.train_step(batch)
                if engine.stop_signal:  # after each step, it is the same on every rank
                    engine.save_checkpoint("checkpoints")
                    sys.exit(128 + engine.stop_signal)

    Where ranks got different ones, the largest number counts. A second signal, more than a second later, raises
    SystemExit at once. After the block the handlers are what they were. The main thread of each rank calls this.
    """
    assert threading.current_thread() is threading.main_thread(), "Python handles signals in the main thread"
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    StopSignals(lambda number: engine.notices.set("signal", number)).install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
