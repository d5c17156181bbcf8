"""The thread of a rank that sends its beats, learns of a verdict, and ends the process where the main thread cannot."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from parallel.errors import ExitCode, LostRankError
from parallel.watch.beat import INTERVAL, Beat
from parallel.watch.board import Board
from parallel.watch.host_mates import HostMates
from parallel.watch.judge import SHORTEST_WAIT, Verdict
from parallel.watch.judging import Judging
from parallel.watch.last_line import LastLine, Speaker, end_now
from parallel.watch.pulse import Pulse

SECONDS_TO_LEARN = 5.0
"""The seconds after a verdict in which a main thread that executes nothing may still come to know it."""

LOOKS_IN_A_BEAT = 4
"""The looks at the launcher from one beat to the next."""


@dataclass(frozen=True)
class Surroundings:
    """The process that started this rank, and the ranks beside it.

    `launcher` is that process, where its end is to end the rank; `host_ranks` are those of this host.
    `speaker` prints a verdict: every rank, the first one that is not lost, or the launcher.
    """

    host_ranks: Sequence[int]
    launcher: int | None = None
    speaker: Speaker = "every"


class Heartbeat(threading.Thread):
    """Sends a beat every second, and learns whether a rank is lost or silent.

    The main thread is told by an exception in its next call, or in the one that fails. Where it is blocked, this thread
    prints the verdict and ends the process: a collective cannot be interrupted. `timeout` is `train.timeout_seconds`.
    """

    def __init__(self, board: Board, pulse: Pulse, surroundings: Surroundings) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.board, self.pulse, self.surroundings = board, pulse, surroundings
        self.timeout = 600.0
        self.has_met = self.main_thread_knows = False
        self.verdict: Verdict | None = None
        self.has_verdict = threading.Event()
        self.last_line = LastLine(board.rank, board.size, surroundings.speaker)
        self._mates = HostMates(board, surroundings.host_ranks)
        self._wake, self._is_stopped = threading.Event(), False
        board.post(pulse.beat(0.0))

    def run(self) -> None:
        judging = Judging(self.board)
        last, age = time.monotonic(), 0.0
        while not self._is_stopped_after_a_pause():
            now = time.monotonic()
            elapsed, last = now - last, now
            beat = self.pulse.beat(elapsed)
            if self.verdict is None:
                self._exchange(beat, judging, elapsed)
            else:
                age += elapsed
                self._end_where_blocked(beat, age)

    def _is_stopped_after_a_pause(self) -> bool:
        """Wait until the next beat is due, with an eye on the launcher; return whether this thread is to end."""
        for _ in range(LOOKS_IN_A_BEAT):
            self._end_with_launcher()
            if self._wake.wait(INTERVAL / LOOKS_IN_A_BEAT):
                break
        self._wake.clear()
        return self._is_stopped

    def _exchange(self, beat: Beat, judging: Judging, elapsed: float) -> None:
        """Send a beat, do what this rank does for the others, and look for a verdict."""
        try:
            self.board.post(beat)
            self._mates.tick()
            judging.tick(elapsed, self.timeout, have_met=self.has_met)
            verdict = self.board.verdict()
        except RuntimeError:
            if not beat.waits and not beat.is_cut_off:  # the store may end sooner than a rank that needs no other
                return
            verdict = Verdict((), "the store in which the ranks meet has ended: its host, torchrun or rank 0, ended")
        if verdict is not None:
            self.verdict, self.last_line.lost = verdict, verdict.ranks
            self.has_verdict.set()
            self._mates.kill_stopped(verdict.stopped)
            self.last_line.tell(verdict.text, verdict.code)
            if verdict.stopped and beat.waits:  # it would not return; and torchrun's SIGTERM would end it more slowly
                self.end_process(LostRankError(verdict.text, verdict.code))

    def _end_where_blocked(self, beat: Beat, age: float) -> None:
        """End the process if the main thread cannot learn of the verdict, which is known for `age` seconds."""
        assert self.verdict is not None
        is_blocked = age > self.timeout
        if not self.main_thread_knows:
            waits = beat.waits or self.board.rank in self.verdict.ranks  # one that is named may be in an endless loop
            is_blocked |= (waits and age >= SHORTEST_WAIT) or min(age, self.pulse.idle) >= SECONDS_TO_LEARN
        if is_blocked:
            self.end_process(LostRankError(self.verdict.text, self.verdict.code))

    def _end_with_launcher(self) -> None:
        launcher = self.surroundings.launcher
        if launcher is not None and os.getppid() != launcher:
            self.end_process(
                LostRankError(f"rank {self.board.rank} ends: the process that started it has ended", ExitCode.LOST)
            )

    def end_process(self, error: LostRankError) -> NoReturn:
        """Print the error in one line, and end this process at once: whatever else it would do could block.

        A second thread that calls this waits for the end, so that what was registered for it is complete.
        """
        with self.last_line.one_at_a_time:
            self._mates.kill_stopped(() if self.verdict is None else self.verdict.stopped)
            self.last_line.tell(str(error), error.code)
            self.last_line.call_hook(error)
            end_now(error.code)

    def hurry(self) -> None:
        """Send the next beat at once."""
        self._wake.set()

    def stop(self, problem: str, code: int) -> bool:
        """Leave the last beat of this rank, and end this thread; return whether it ran."""
        if self._is_stopped:
            return False
        self._is_stopped = True
        with suppress(RuntimeError):  # where the store has ended, nobody reads it
            self.board.post(self.pulse.last_beat(problem, code))
        self._wake.set()
        if threading.current_thread() is not self:
            self.join(timeout=5.0)  # a thread that is in the store at the end of the interpreter would abort it
        return True
