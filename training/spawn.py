"""Start the ranks of one host, as torchrun does but sooner and without its agent.

Importing torch takes seconds, so a fork server imports it once, and every rank is a fork of the server. The server does
nothing else: it runs no backward and no CUDA, because a fork must not inherit their threads.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import TypeAlias, TypeVar

from parallel.engine.stop_signals import STOP_SIGNALS, StopSignals, code_of, do_nothing
from parallel.errors import SIGNALLED, ExitCode
from parallel.mesh.process_groups import connect_to_store, host_store
from parallel.watch.beat import Beat
from parallel.watch.board import NO_RANK, Board, prefix_of
from parallel.watch.control_groups import OomKills
from parallel.watch.judge import Verdict
from parallel.watch.launch_history import PREFIX, LaunchHistory, RunStart
from parallel.watch.process import die_with
from parallel.watch.terminal import print_line, show_cursor

T = TypeVar("T")

GRACE_SECONDS = 5.0

SECONDS_TO_END = 30.0
"""The seconds that rank 0 may take to end, once another rank has ended for a reason that all have."""

OF_ALL = ExitCode.REFUSED, ExitCode.NOT_FINITE
"""The exit codes of ends that all ranks come to by themselves."""

SERVER_ENDED = 255
"""The exit code that multiprocessing gives a rank when the fork server, which alone could tell it, has ended."""

SEARCH = ("PYTHONPATH", "PYTHONSAFEPATH")
"""The variables that say where Python searches modules."""


OnLost: TypeAlias = Callable[[RunStart | None, int, str, Beat], None]


def run_ranks(
    main: Callable[[T], int],
    argument: T,
    num_ranks: int,
    *,
    preload: Sequence[str] = ("torch", "training.run"),
    stop: StopSignals | None = None,
    on_lost: OnLost | None = None,
) -> int:
    """Call `main(argument)` in each of `num_ranks` processes, in the environment that torchrun would give them.

    `preload` names modules that are imported once, for all ranks, in this order. Returns 0 if all ranks return 0.
    Otherwise it ends the others and returns the exit code of the first rank that failed: LOST for one that a signal has
    killed. No rank is left running, however this function ends. This process hosts the store in which the ranks meet,
    so that a rank that is stopped does not stop it.

    `stop` are the signals of this process: the first is forwarded to the ranks, and a second one ends them. A rank
    begins with them blocked: `main` unblocks them when it has installed its handlers.
    `on_lost` is called where a rank was lost, with how the run began, the exit code, what was printed and its last
    beat; after a second signal with those of rank 0, and nothing printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, "training.ends_with_launcher"])
    _start_server()
    store, port = host_store(prefix_of("0"))
    board = Board(store, rank=NO_RANK, size=num_ranks)
    history = LaunchHistory(connect_to_store("127.0.0.1", port, hosts=False, prefix=PREFIX))
    ranks: list[ForkServerProcess] = []
    stop = stop or StopSignals()
    stop.tell(do_nothing)  # until all ranks have been started, which are told then
    watched = _Ranks(ranks, board, history, stop, on_lost)
    try:
        for rank in range(num_ranks):
            environment = _environment(rank, num_ranks, port)
            process = context.Process(target=_rank, args=(main, argument, environment), name=f"rank {rank}")
            process.start()
            ranks.append(process)
        stop.tell(partial(_forward, ranks))
        return watched.wait()
    except SystemExit as end:  # a rank that is in a long call is killed before it could write that
        if on_lost is not None and (beats := board.beats([0])):
            on_lost(history.start(), int(end.code or 0), "", beats[0])
        raise
    finally:
        _end(ranks)
        show_cursor()  # which a rank that was killed has hidden
        watched.print_reason()


def _start_server() -> None:
    """Start the fork server. It ignores signals that ask for an end, which may be sent to all processes: ranks end.

    It searches modules where this process does. By itself it would search the working directory first, and import a
    `training` of the user's.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    own = _values(SEARCH)
    searched = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    _set_values({"PYTHONPATH": searched, "PYTHONSAFEPATH": "1"})
    try:
        forkserver.ensure_running()
    finally:
        _set_values(own)
        for number, handler in before.items():
            signal.signal(number, handler)


def _values(names: Iterable[str]) -> dict[str, str | None]:
    """Return the values of these environment variables; None where one is not set."""
    return {name: os.environ.get(name) for name in names}


def _set_values(values: Mapping[str, str | None]) -> None:
    """Set environment variables, and remove those whose value is None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str | None]:
    """Return the variables that torchrun would set for a rank, and those that only the fork server has otherwise."""
    return {
        **_values(SEARCH),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for a store that no rank hosts
    }


def _rank(main: Callable[[T], int], argument: T, environment: Mapping[str, str | None]) -> None:
    """Run a rank, in its own process, until it exits."""
    for number in STOP_SIGNALS:  # the fork server ignores them, and they are blocked until `main` handles them
        signal.signal(number, signal.SIG_DFL)
    die_with(os.getppid())  # the fork server, which ends with the parent
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _set_values(environment)
    sys.exit(main(argument))


def _die_with_parent() -> None:
    """Wait for the end of the parent, even one that is killed, and then end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


class _Ranks:
    """The processes of the ranks, while the launcher waits for them."""

    def __init__(
        self,
        processes: Sequence[ForkServerProcess],
        board: Board,
        history: LaunchHistory,
        stop: StopSignals,
        on_lost: OnLost | None,
    ) -> None:
        self._processes, self._board, self._history = processes, board, history
        self._stop, self._on_lost, self._oom_kills = stop, on_lost, OomKills()
        self._reason = ""  # what is still to be printed

    def wait(self) -> int:
        """Wait until all ranks have ended or one has failed, and return its exit code, or 0."""
        running = {process.sentinel: process for process in self._processes}
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running)) if isinstance(sentinel, int)]
            if failed := [process for process in ended if _exit_code(process)]:
                return self._end_by(failed)
        return 0

    def _end_by(self, failed: Sequence[ForkServerProcess]) -> int:
        """Tell why the run ends, where no rank has, and return the exit code."""
        code = self._code_of_all(failed)
        if code in OF_ALL or self._has_told(code, failed):
            self._processes[0].join(SECONDS_TO_END if code > SIGNALLED else GRACE_SECONDS)
        elif code == ExitCode.LOST and (verdict := self._verdict(failed)) is not None:
            self._tell(code, verdict.text, verdict.ranks)
            for rank in verdict.ranks:
                self._processes[rank].kill()  # it may be stopped, and would not end otherwise
        elif not (self._stop.number and min(map(_exit_code, failed)) == -self._stop.number):
            # When a signal kills a rank, others may fail because of it in that moment: the least code is its own.
            rank = self._processes.index(min(failed, key=_exit_code))
            self._tell(code, f"{self._how_it_ended(rank)}; ending the others", [rank])
        return code

    def _tell(self, code: int, text: str, ranks: Sequence[int]) -> None:
        """Print why the run ends, and have it written. On a terminal, ranks end first: one has a progress bar there."""
        self._reason = text
        if not sys.stderr.isatty():
            self.print_reason()
        beats = self._board.beats(ranks[:1])
        if self._on_lost is not None and beats:
            self._history.is_first("record", "launcher")  # so that no rank writes it later in other words
            self._on_lost(self._history.start(), code, text, beats[0])

    def print_reason(self) -> None:
        """Print why the run ends, if it was not printed."""
        if self._reason:
            sys.stderr.flush()
            print_line(self._reason)
            self._reason = ""

    def _verdict(self, failed: Sequence[ForkServerProcess]) -> Verdict | None:
        """Return what the ranks have found, if those that failed have ended by it.

        A signal has killed none of them, then, or it was a rank that did not answer, which another one has killed.
        """
        verdict = self._board.verdict()
        ranks = set(map(self._processes.index, failed))
        has_ended_them = all(_exit_code(process) >= 0 for process in failed)
        return verdict if verdict is not None and (has_ended_them or set(verdict.stopped) & ranks) else None

    def _has_told(self, code: int, failed: Iterable[ForkServerProcess]) -> bool:
        """Return whether one of these told the others that it ends with this code, as a traceback does not."""
        beats = self._board.beats([self._processes.index(process) for process in failed])
        return code != ExitCode.LOST and any(beat.ended and beat.code == code for beat in beats)

    def _code_of_all(self, failed: Sequence[ForkServerProcess]) -> int:
        """Return the exit code for all ranks, of which these failed: a rank that lost another one is not the first.

        A rank that a signal has killed before it could handle it, since it had just been started, has ended by it.
        """
        least = min(map(_exit_code, failed))
        if least == -self._stop.number:
            return code_of(self._stop.number)
        return int(ExitCode.LOST) if least < 0 or least == SERVER_ENDED else least

    def _how_it_ended(self, rank: int) -> str:
        """Return which rank ended and how, and how far it had come when it last told."""
        code, beats = _exit_code(self._processes[rank]), self._board.beats([rank])
        name, position = f"rank {rank}", ""
        if beats:
            name, position = beats[0].name, f", last seen {beats[0].position}"
        if code == -signal.SIGKILL and (explanation := self._oom_kills.explanation()):
            return f"{name} was {explanation}{position}"
        if code == SERVER_ENDED:
            return "the process that starts the ranks was killed"
        if code < 0:
            return f"{name} was killed by signal {-code}, {signal.Signals(-code).name}{position}"
        return f"{name} ended with exit code {code}{position}"


def _exit_code(process: ForkServerProcess) -> int:
    """Return the exit code, or the number of the signal that killed the process, negative."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _forward(ranks: Sequence[ForkServerProcess], number: int) -> None:
    """Send a signal to the ranks that still run."""
    for process in ranks:
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _end(ranks: Sequence[ForkServerProcess]) -> None:
    """Ask the ranks that still run to end, and kill those that do not within GRACE_SECONDS."""
    for process in ranks:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()
        process.close()
