"""The watch of a rank over the others, as its main thread uses it."""

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

from parallel.errors import ColonnadeError, ExitCode, LostRankError, shortened
from parallel.watch.beat import Beat
from parallel.watch.board import Board
from parallel.watch.heartbeat import Heartbeat
from parallel.watch.judge import Verdict
from parallel.watch.last_line import end_now
from parallel.watch.meeting import meet
from parallel.watch.progress import Progress

SECONDS_FOR_A_VERDICT = 15.0
"""The seconds that a rank whose connection broke waits to be told who ended."""

SECONDS_TO_LEAVE = 3.0
"""The seconds that the host of a store waits for the others, when its program has ended."""

BROKEN = ("onnection", "roken pipe", "remote process exited", "NCCL error")
"""Parts of the messages of gloo, NCCL and torch for a connection that broke."""


class Watch:
    """The watch where nobody can be watched: a world of one, or process groups that were made without a store."""

    def __init__(self) -> None:
        self.progress = Progress()

    @property
    def timeout(self) -> float:
        """The seconds after which a rank that is waited for is named: `train.timeout_seconds`."""
        return 600.0

    @property
    def is_on(self) -> bool:
        """True if ranks are watched, and this one has not left."""
        return False

    def begin(self, action: str) -> None:
        """Note that this rank begins something that all ranks do. Raises LostRankError where one is lost or silent."""
        self.progress.begin(action)

    def check(self) -> None:
        """Raise LostRankError where a rank is lost or silent; long waits of another kind call this again and again."""

    def set_timeout(self, seconds: float) -> None:
        """Set `train.timeout_seconds` before the ranks meet, which may take long: they prepare their data."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Note that this thread works apart from the main thread in the block, which does not wait when this one does.

        Its waits for other ranks count only while the main thread executes nothing, since that may wait for it.
        """
        me = threading.get_ident()
        self.progress.apart.add(me)
        try:
            yield
        finally:
            self.progress.apart.discard(me)

    def at_end(self, hook: Callable[[LostRankError], None]) -> None:
        """Have `hook` called with the error before a rank ends because another one was lost or silent.

        It is called in a thread of its own, and the process ends two seconds later whatever it does.
        """

    def lost(self) -> Beat | None:
        """Return the last beat of the first rank that was lost or silent; None where none is known."""
        return None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context for long work of this rank alone, which the others wait for and which is no silence."""
        return self.progress.during(name)

    def explained(self, error: RuntimeError) -> Exception:
        """Return the error that names the lost rank, in place of that of a collective whose connection broke."""
        return error

    def follow_errors(self) -> None:
        """Tell the others of an exception that ends this process; called once all have joined their process groups.

        (torch sets an excepthook of its own then, within which no process can be ended.)
        """

    def meet(self, facts: Mapping[str, Any], timeout: float) -> None:
        """Return when all ranks have called this with equal facts; else raise ConfigError, on every rank.

        `timeout` is `train.timeout_seconds`, for this and for all that follows.
        """

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Have every rank end with what this one refuses in the block, before all have met."""
        try:
            yield
        except ColonnadeError as error:
            self.refuse(str(error))
            if isinstance(error, LostRankError):
                self.follow_errors()
            raise

    def refuse(self, problem: str) -> None:
        """Tell the ranks that have not met yet that this one refuses to start."""

    def end(self, error: LostRankError) -> int:
        """Print the error, where this rank prints it, and end the process; return its exit code where it goes on."""
        return error.code

    def leave(self, problem: str = "", code: int = ExitCode.LOST) -> None:
        """End the watch: this rank needs no other any more. `problem`: why it ends, if not because all is done."""


class StoreWatch(Watch):
    """The watch by heartbeats in the store.

    A thread sends the beats (see `Heartbeat`). `hosts_store`: the store ends with this process.
    """

    def __init__(self, board: Board, heartbeat: Heartbeat, *, hosts_store: bool) -> None:
        super().__init__()
        self._board, self._heartbeat, self._hosts_store = board, heartbeat, hosts_store
        self.progress = heartbeat.pulse.progress
        self._previous_hook: Callable[..., object] | None = None
        self._at_exit = Finalize(
            self, self.leave, exitpriority=0
        )  # also in a process of multiprocessing, unlike atexit
        heartbeat.start()

    @property
    def timeout(self) -> float:
        return self._heartbeat.timeout

    @property
    def is_on(self) -> bool:
        return self._heartbeat.is_alive()

    def begin(self, action: str) -> None:
        super().begin(action)
        self.check()

    def check(self) -> None:
        if self._heartbeat.verdict is not None:
            raise self._lost(self._heartbeat.verdict)

    def set_timeout(self, seconds: float) -> None:
        self._heartbeat.timeout = seconds

    def at_end(self, hook: Callable[[LostRankError], None]) -> None:
        self._heartbeat.last_line.on_end = hook

    def lost(self) -> Beat | None:
        verdict = self._heartbeat.verdict
        if verdict is None or not verdict.ranks:  # the store has ended
            return None
        with suppress(RuntimeError):
            return next(iter(self._board.beats(verdict.ranks[:1])), None)
        return None

    def explained(self, error: RuntimeError) -> Exception:
        if not any(part in str(error) for part in BROKEN):
            return error
        self.progress.is_cut_off = True
        self._heartbeat.hurry()
        self._heartbeat.has_verdict.wait(SECONDS_FOR_A_VERDICT)
        verdict = self._heartbeat.verdict
        return error if verdict is None else self._lost(verdict)

    def follow_errors(self) -> None:
        if self._previous_hook is None:
            self._previous_hook, sys.excepthook = sys.excepthook, self._on_error

    def _lost(self, verdict: Verdict) -> LostRankError:
        if threading.get_ident() not in self.progress.apart:
            self._heartbeat.main_thread_knows = True
        return LostRankError(verdict.text, verdict.code)

    def meet(self, facts: Mapping[str, Any], timeout: float) -> None:
        self._heartbeat.timeout = timeout
        try:
            meet(self._board, facts, timeout, self.check)
        except LostRankError:
            if self._board.rank and self._heartbeat.verdict is None:
                self._heartbeat.last_line.lost = (0,)  # for which this rank waited, so another one prints it
            raise
        self._heartbeat.has_met = True

    def refuse(self, problem: str) -> None:
        with suppress(RuntimeError):  # where the store has ended, the others know
            self._board.refuse(problem)
        self.leave(problem, code=2)

    def end(self, error: LostRankError) -> int:
        self._heartbeat.end_process(error)

    def leave(self, problem: str = "", code: int = ExitCode.LOST) -> None:
        if not self._heartbeat.stop(problem, code):
            return
        self._at_exit.cancel()
        if self._previous_hook is not None and sys.excepthook == self._on_error:
            sys.excepthook = self._previous_hook
        if self._hosts_store:
            self._wait_for_the_others()

    def _wait_for_the_others(self) -> None:
        """Wait until every rank has ended, since the store ends with this process."""
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        with suppress(RuntimeError):
            while any(beat.ended is None for beat in self._board.beats(range(self._board.size))):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Tell the others why this process ends; end with one line, and without a traceback, where it lost another.

        Else it ends with 1, at once after what was registered with `atexit`: the process groups that an error leaves
        behind may block, or abort the process with another exit code.
        """
        if isinstance(error, RuntimeError):
            explained = self.explained(error)
            error = error if isinstance(explained, RuntimeError) else explained
        if isinstance(error, LostRankError):
            self._heartbeat.end_process(error)
        lines = str(error).strip().splitlines()
        self.leave(f"{kind.__name__}: {shortened(lines[0])}" if lines else kind.__name__)
        assert self._previous_hook is not None
        self._previous_hook(kind, error, trace)
        if isinstance(error, Exception) and not hasattr(sys, "ps1"):
            atexit._run_exitfuncs()
            end_now(1)


UNWATCHED = Watch()
