"""The beats of this rank, made from the progress of its main thread and from a look at its stack."""

import threading
from dataclasses import replace

from parallel.watch.beat import Beat
from parallel.watch.process import host_name, own_identity
from parallel.watch.progress import Progress
from parallel.watch.stack import look

SECONDS_OF_A_KERNEL = 5.0
"""The seconds after which a main thread that executes nothing is taken to wait for a GPU, which waits for a rank.

Or for a thread that works apart from it, and that waits for a rank.
"""


class Pulse:
    """Makes the beats of this rank from the progress of its main thread and a look at its stack.

    `idle` is for how many seconds that thread has executed no Python.
    """

    def __init__(self, rank: int, progress: Progress) -> None:
        self.progress, self.idle = progress, 0.0
        self._last = Beat(rank, host_name(), own_identity())
        self._main, self._before = threading.main_thread().ident or 0, (0, 0, 0)

    def beat(self, elapsed: float) -> Beat:
        """Return the next beat, `elapsed` seconds after the last one."""
        progress = self.progress
        sight = look(self._main, progress.apart)
        now = (*sight.instruction, progress.calls)
        self.idle = self.idle + elapsed if now == self._before else 0.0
        self._before = now
        # A main thread that executes nothing may wait for a kernel, or for a thread that works apart from it.
        waits_behind = self.idle >= SECONDS_OF_A_KERNEL and (progress.uses_gpu or sight.waits_apart)
        self._last = replace(
            self._last,
            tick=self._last.tick + 1,
            calls=progress.calls,
            step=progress.step,
            action=progress.action,
            part=progress.part,
            phase=progress.phase or ("compiling" if sight.compiles else ""),
            place=sight.place,
            waits=sight.waits or waits_behind,
            is_cut_off=progress.is_cut_off,
        )
        return self._last

    def last_beat(self, problem: str, code: int) -> Beat:
        """Return the beat with which this rank ends."""
        return replace(self.beat(0.0), ended=problem, code=code)
