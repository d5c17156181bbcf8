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
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import TypeVar

from parallel.mesh.process_groups import host_store
from parallel.watch.board import NO_RANK, Board, prefix_of
from parallel.watch.judge import LOST
from parallel.watch.process import die_with

T = TypeVar("T")

GRACE_SECONDS = 5.0
REFUSED, NOT_FINITE = 2, 4
"""The exit codes of a rank that refuses what the user gave, and of one whose numbers are not finite."""

SEARCH = ("PYTHONPATH", "PYTHONSAFEPATH")
"""The variables that say where Python searches modules."""


def run_ranks(
    main: Callable[[T], int], argument: T, num_ranks: int, *, preload: Sequence[str] = ("torch", "training.run")
) -> int:
    """Call `main(argument)` in each of `num_ranks` processes, in the environment that torchrun would give them.

    `preload` names modules that are imported once, for all ranks, in this order. Returns 0 if all ranks return 0.
    Otherwise it ends the others and returns the exit code of the first rank that failed: LOST for one that a signal has
    killed. No rank is left running, however this function ends. This process hosts the store in which the ranks meet,
    so that a rank that is stopped does not stop it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    _start_server()
    store, port = host_store(prefix_of("0"))
    board = Board(store, rank=NO_RANK, size=num_ranks)
    ranks: list[ForkServerProcess] = []
    try:
        for rank in range(num_ranks):
            environment = _environment(rank, num_ranks, port)
            process = context.Process(target=_rank, args=(main, argument, environment), name=f"rank {rank}")
            process.start()
            ranks.append(process)
        return _first_failure(ranks, board)
    finally:
        _end(ranks)


def _start_server() -> None:
    """Start the fork server. It ignores Ctrl-C from the first: during its imports that would end in a traceback.

    It searches modules where this process does. By itself it would search the working directory first, and import a
    `training` of the user's.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    own = _values(SEARCH)
    searched = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    _set_values({"PYTHONPATH": searched, "PYTHONSAFEPATH": "1"})
    try:
        forkserver.ensure_running()
    finally:
        _set_values(own)
        signal.signal(signal.SIGINT, before)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends the ranks
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


def _first_failure(ranks: Sequence[ForkServerProcess], board: Board) -> int:
    """Wait until all ranks have ended or one has failed, and return its exit code, or 0."""
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running)) if isinstance(sentinel, int)]
        failed = [process for process in ended if _exit_code(process)]
        if failed:
            code = _code_of_all(failed)
            if code in (REFUSED, NOT_FINITE) or _have_told(code, map(ranks.index, failed), board):
                ranks[0].join(GRACE_SECONDS)  # every rank ends for the same reason, which rank 0 prints: let it finish
            elif (
                code == LOST
                and (verdict := board.verdict()) is not None
                and (all(map(_has_exited, failed)) or set(verdict.stopped) & set(map(ranks.index, failed)))
            ):
                print(verdict.text, file=sys.stderr)
                for rank in verdict.ranks:
                    ranks[rank].kill()  # it may be stopped, and would not end otherwise
            else:
                # When a signal kills a rank, others may fail because of it in that moment: the least code is its own.
                first = min(failed, key=_exit_code)
                print(f"{_how_it_ended(first, ranks.index(first), board)}; ending the others", file=sys.stderr)
            return code
    return 0


def _have_told(code: int, ranks: Iterable[int], board: Board) -> bool:
    """Return whether one of these ranks told the others that it ends with this code, as a traceback does not."""
    return code != LOST and any(beat.ended and beat.code == code for beat in board.beats(list(ranks)))


def _has_exited(process: ForkServerProcess) -> bool:
    """Return whether the process ended by itself, and no signal killed it."""
    return _exit_code(process) >= 0


def _code_of_all(failed: Sequence[ForkServerProcess]) -> int:
    """Return the exit code for all ranks, of which these have failed: a rank that lost another one is not the first."""
    least = min(map(_exit_code, failed))
    return LOST if least < 0 else least


def _exit_code(process: ForkServerProcess) -> int:
    """Return the exit code, or the number of the signal that killed the process, negative."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _how_it_ended(process: ForkServerProcess, rank: int, board: Board) -> str:
    """Return which rank ended and how, and how far it had come when it last told."""
    code, beats = _exit_code(process), board.beats([rank])
    name, position = (beats[0].name, f", last seen {beats[0].position}") if beats else (process.name, "")
    if code < 0:
        return f"{name} was killed by signal {-code}, {signal.Signals(-code).name}{position}"
    return f"{name} ended with exit code {code}{position}"


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
