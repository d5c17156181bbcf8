"""A process of a command whose work is done by ranks, from its preparation to its end: a rank, or their launcher."""

import argparse
import atexit
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from signal import Signals
from traceback import extract_tb

from colonnade.process import end_text
from colonnade.work import Launch, Prepared
from parallel.engine.context import Place, watch_of
from parallel.engine.rendezvous import open_history
from parallel.engine.stop_signals import StopSignals, code_of, do_nothing, end_at_once, ignore_stop_signals
from parallel.errors import (
    SIGNALLED,
    CollectiveError,
    ColonnadeError,
    DiskFullError,
    ExitCode,
    LostRankError,
    NoRoomError,
    RoomError,
    SignalError,
    StorageError,
    shortened,
)
from parallel.mesh.process_groups import leave
from parallel.watch.beat import Beat
from parallel.watch.last_line import end_now
from parallel.watch.launch_history import RunStart
from parallel.watch.watch import UNWATCHED
from training.attempt import Attempt
from training.ended import Ended, EndRecord
from training.spawn import run_ranks

OF_ONE_RANK = StorageError | RoomError | NoRoomError | CollectiveError
"""The errors that may be of one rank alone."""


PHASES = {0: "done"} | dict.fromkeys((ExitCode.INTERRUPTED, ExitCode.REQUEUED, ExitCode.TERMINATED), "training")
"""The phases of ends to which all ranks have come together, whatever they did last."""


class UncaughtError(ColonnadeError):
    """The end by an exception that nothing has foreseen; the rank's log has its traceback."""

    code = ExitCode.FAILED


class RankProcess:
    """This process as a rank of a run, or as the launcher of the ranks; `came` are signals that have come before."""

    def __init__(self, came: Sequence[int]) -> None:
        self.place, self.watch = Place(), UNWATCHED
        self.stop = StopSignals()
        for number in came:
            self.stop.handle(number)
        self.attempt = Attempt(self.stop)
        self._has_met = False

    def run(
        self,
        main: Callable[[argparse.Namespace], int],
        arguments: argparse.Namespace,
        prepare: Callable[[Launch], Prepared],
    ) -> int:
        """Prepare the work and do it, and return the exit code. A rank that is watched ends the process itself."""
        try:
            code = self._run(main, arguments, prepare)
        except LostRankError as error:
            return self.watch.end(error)
        except ColonnadeError as error:
            code = self._end(error)
        except Exception as error:
            explained = self.watch.explained(error) if isinstance(error, RuntimeError) else error
            if isinstance(explained, LostRankError):
                return self.watch.end(explained)
            if self.attempt.record.log is None:
                raise
            code = self._end(self._uncaught(error))
        except SystemExit as end:  # by a signal, at once
            if self.watch is UNWATCHED or not isinstance(end.code, int):
                raise
            code = self._end_at_once(end.code)
        return self._leave_process(code)

    def _run(
        self,
        main: Callable[[argparse.Namespace], int],
        arguments: argparse.Namespace,
        prepare: Callable[[Launch], Prepared],
    ) -> int:
        self.place = Place.from_environment()
        is_alone = self.place.world_size == 1
        self.stop.install()
        self.stop.tell(end_at_once if is_alone else do_nothing)
        self.attempt = Attempt(self.stop, open_history())
        if (decision := self.attempt.history.decision()) is not None:
            self._print(f"not started again, since the run ended by its own decision: {decision.text}")
            return decision.code
        self.watch = watch_of(self.place, speaker="launcher" if _has_launcher() else "first")
        self.watch.at_end(self._record_loss)
        with self.watch.refusing(), self.watch.phase("preparation"):
            prepared = prepare(
                Launch(
                    self.place,
                    arguments.nprocs or self.place.world_size,
                    end_if_asked=self._end_if_asked,
                    watch=self.watch,
                    history=self.attempt.history,
                )
            )
            if self.watch.is_on:
                self.watch.meet(prepared.facts(), prepared.timeout)
            self._has_met = True
        if arguments.nprocs is not None:
            return self._launch(main, arguments, prepared.modules)
        if self.stop.number:
            name = Signals(self.stop.number).name
            raise SignalError(f"{name}: ended before the run began; nothing is lost", code_of(self.stop.number))
        self.stop.tell(end_at_once)
        prepared.work(self.watch, self.attempt)
        self._done()
        return 0

    def _launch(
        self, main: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, modules: Sequence[str]
    ) -> int:
        """Start the ranks, each of which calls `main`, and return their exit code."""
        num_ranks, arguments.nprocs = arguments.nprocs, None
        preload = ["colonnade", "torch", *modules]  # the first finds our own
        return run_ranks(main, arguments, num_ranks, preload=preload, stop=self.stop, on_lost=record_lost)

    def _end_if_asked(self) -> None:
        """End a long preparation by a signal. Raises LostRankError where another rank is silent."""
        if self.stop.number:
            end_at_once(self.stop.number)
        self.watch.check()

    def _done(self) -> None:
        self._decide(0, "done")
        if self.place.rank == 0:
            self._record(0, "done")
        self.watch.leave()
        leave()

    def _end(self, error: ColonnadeError) -> int:
        """Tell the other ranks why this one ends, print it where this rank is to, and return the exit code."""
        may_go_away = isinstance(error, UncaughtError | StorageError)
        prints = self._prints(error)
        if not may_go_away:
            self._decide(error.code, str(error))
        first_line = str(error).partition("\n")[0]  # of a shortage: tables follow
        reason = first_line if isinstance(error, OF_ONE_RANK) else str(error)
        self.watch.leave(f"it {'refuses' if error.code == ExitCode.REFUSED else 'ends'}: {reason}", code=error.code)
        if prints:
            self.attempt.history.is_first("record", str(self.place.rank))
            self._record(error.code, str(error), error.phase)
            print(error, file=sys.stderr)
        return int(error.code)

    def _prints(self, error: ColonnadeError) -> bool:
        """Return whether this rank prints why it ends: the first that ends, once the ranks have met.

        Before, all ranks refuse together, and rank 0 prints it. So it does where ranks share nothing, but for what may
        be of one rank alone.
        """
        if self._has_met and self.attempt.history.is_shared:
            return self.attempt.history.is_first("word", str(self.place.rank))
        is_of_one = isinstance(error, OF_ONE_RANK | UncaughtError) and not isinstance(error, DiskFullError)
        return self.place.rank == 0 or is_of_one

    def _end_at_once(self, code: int) -> int:
        """End by a signal without a word to the others, which end by their own. A launcher prints it for its ranks."""
        text = end_text(Signals(code - SIGNALLED))
        self.watch.leave(text)
        if self.place.rank == 0:
            self._record(code, text)
            if not _has_launcher():
                print(text, file=sys.stderr)
        return code

    def _uncaught(self, error: Exception) -> UncaughtError:
        lines = str(error).strip().splitlines() or [""]
        frame = extract_tb(error.__traceback__)[-1]
        return UncaughtError(
            f"rank {self.place.rank}: {type(error).__name__}: {shortened(lines[0])} ({frame.filename}:{frame.lineno})."
            f" The traceback is in {self.attempt.record.log}."
        )

    def _decide(self, code: int, text: str) -> None:
        self.attempt.history.decide(code, text)

    def _record(self, code: int, text: str, phase: str = "") -> None:
        phase = PHASES.get(code, phase)
        self.attempt.record.write(Ended.of_rank(code, text, self.place.rank, self.watch.progress, phase))

    def _record_loss(self, error: LostRankError) -> None:
        """Write the end of the run, before this process ends because of a lost rank."""
        lost = self.watch.lost()
        if lost is None:
            self._record(error.code, str(error))
        elif self.attempt.history.is_first("record", str(self.place.rank)):
            found = Ended.of_lost(error.code, str(error), lost)  # a beat is up to a second old
            self.attempt.record.write(replace(found, step=max(lost.step, self.watch.progress.step)))

    def _print(self, text: str) -> None:
        if self.place.rank == 0:
            print(text, file=sys.stderr)

    def _leave_process(self, code: int) -> int:
        """End a rank that has launcher and peers at once: what threads of torch do at the end may fail, or print."""
        ignore_stop_signals()
        if self.watch is not UNWATCHED:
            with suppress(Exception):
                atexit._run_exitfuncs()
            end_now(code)
        return code


def _has_launcher() -> bool:
    return multiprocessing.parent_process() is not None


def record_lost(start: RunStart | None, code: int, text: str, beat: Beat) -> None:
    """Write the end of a run whose rank was killed, as the launcher has printed it, if the run had made its folder.

    A rank that lost it may have written the end before; the launcher knows more, such as the signal. Without a text a
    second signal ends the run.
    """
    text = text or end_text(Signals(code - 128))
    if start is not None:
        record = EndRecord()
        record.begin(Path(start.folder), removes=False)
        record.write(Ended.of_lost(code, text, replace(beat, step=max(beat.step, record.step()))))
