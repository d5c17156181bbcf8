"""Ranks started by ourselves, on one host: what torchrun does, sooner and without its daemons.

Importing torch takes seconds, so a fork server imports it once and every rank is a fork of that. The server does
nothing else: no backward, no CUDA, for a fork must not inherit their threads.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import TypeVar

T = TypeVar("T")

GRACE_SECONDS = 5.0
REFUSED = 2  # the exit code of a rank that a user's error has ended


def run_ranks(main: Callable[[T], int], argument: T, num_ranks: int) -> int:
    """Call `main(argument)` in each of `num_ranks` processes, in the environment that torchrun would give them.

    Returns 0 when all have returned 0, else the exit code of the first that did not, the others having been ended.
    However this ends, no rank outlives it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "training.run"])
    _start_server()
    port = _free_port()
    ranks: list[ForkServerProcess] = []
    try:
        for rank in range(num_ranks):
            environment = _environment(rank, num_ranks, port)
            process = context.Process(target=_rank, args=(main, argument, environment), name=f"rank {rank}")
            process.start()
            ranks.append(process)
        return _first_failure(ranks)
    finally:
        _end(ranks)


def _start_server() -> None:
    """Deaf to Ctrl-C from its first moment: it would end in a traceback while it imports."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(main: Callable[[T], int], argument: T, environment: dict[str, str]) -> None:
    """A rank's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and that ends the ranks in order
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.update(environment)
    sys.exit(main(argument))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _first_failure(ranks: Sequence[ForkServerProcess]) -> int:
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running)) if isinstance(sentinel, int)]
        failed = [process for process in ended if _exit_code(process)]
        if failed:
            if all(_exit_code(process) == REFUSED for process in failed):
                ranks[0].join(GRACE_SECONDS)  # what every rank refuses the first one says: let it
            # A rank killed by a signal makes others fail, which may be noticed in the same moment.
            first = max(failed, key=_exit_code)
            print(f"{first.name} ended with exit code {_exit_code(first)}; ending the others", file=sys.stderr)
            return _exit_code(first)
    return 0


def _exit_code(process: ForkServerProcess) -> int:
    """As a shell has it: 128 + the number of the signal that killed it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def _end(ranks: Sequence[ForkServerProcess]) -> None:
    """Ask those that still run to end, and kill those that do not within the grace."""
    for process in ranks:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()
        process.close()
