"""Run a function on several ranks at once: processes that are joined in a gloo process group.

    def sum_of_ranks(rank: int, world_size: int) -> float: ...
    assert run(sum_of_ranks, 4) == [6.0] * 4

Importing torch takes seconds, so a fork server imports it once, along with the test modules collected by then, and
every rank is a fork of that server. A fork must not inherit threads: no test module may run a backward at import.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.patience import LIMIT, patient, wait_until

T = TypeVar("T")

PRELOADED_PACKAGES = ("parallel", "models", "training", "colonnade", "tests")


class RankError(Exception):
    """A rank raised an exception, died or did not return in time. The message says which rank, and where it was."""


@dataclass(frozen=True)
class Task:
    """The task of every rank: the function, its arguments, and the folder where the ranks meet."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    world_size: int
    timeout: float
    folder: Path

    def name_of(self, rank: int) -> str:
        return f"rank {rank} of {self.world_size}"

    def stacks_of(self, rank: int) -> Path:
        """Return the file to which a rank that hangs or crashes writes its stack."""
        return self.folder / f"stacks_of_rank_{rank}"


@dataclass(frozen=True)
class Report:
    """The report that a rank sends back: the saved result, or the traceback of its failure."""

    saved: bytes = b""
    failure: str = ""


@dataclass(frozen=True)
class Rank:
    """The parent's end of one rank."""

    index: int
    process: ForkServerProcess
    connection: Connection


def run(function: Callable[..., T], world_size: int, *arguments: Any, timeout: float = LIMIT) -> list[T]:
    """Call `function(rank, world_size, *arguments)` on `world_size` gloo ranks; return the results in order of rank.

    The function must be at the top level of a module, so that the ranks can import it. When it starts, the default
    process group is ready. The first rank that fails ends them all, and the RankError shows its traceback; after
    `timeout` seconds it shows where each unfinished rank is stuck.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        task = Task(function, arguments, world_size, timeout, Path(folder))
        with _started(task) as ranks:
            reports = _collect(ranks, task)
            _dismiss(ranks, task)
    return [torch.load(io.BytesIO(report.saved), weights_only=False) for report in reports]


@contextmanager
def _started(task: Task) -> Iterator[list[Rank]]:
    """Start the ranks of a task; those that are still running at the end of the block are killed."""
    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo when the first optimizer is made, which would take each rank a second.
    context.set_forkserver_preload(["torch", "torch._dynamo", *_imported_by_now()])
    ranks: list[Rank] = []
    try:
        for index in range(task.world_size):
            ranks.append(_start(context, index, task))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
        for rank in ranks:
            rank.process.join()
            rank.process.close()
            rank.connection.close()


def _start(context: ForkServerContext, index: int, task: Task) -> Rank:
    """Start the process of one rank."""
    ours, theirs = context.Pipe()
    with theirs:
        process = context.Process(target=_serve, args=(index, task, theirs), name=f"rank {index}", daemon=True)
        process.start()
    return Rank(index, process, ours)


def _imported_by_now() -> list[str]:
    """Return the modules of this project that are imported here: the ranks will need them, and what they import."""
    return [name for name in sys.modules if name.split(".")[0] in PRELOADED_PACKAGES]


def _collect(ranks: list[Rank], task: Task) -> list[Report]:
    """Return every rank's report in order of rank, or raise a RankError."""
    __tracebackhide__ = True
    deadline = time.monotonic() + task.timeout
    waiting = {rank.connection: rank for rank in ranks}
    reports: dict[int, Report] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(_where_they_hang(list(waiting.values()), task))
        for connection in [connection for connection in waiting if connection in ready]:
            rank = waiting.pop(connection)
            reports[rank.index] = _receive(rank, ranks, task)
    return [reports[rank.index] for rank in ranks]


def _receive(rank: Rank, ranks: list[Rank], task: Task) -> Report:
    """Return the report of a rank that has one. Raises a RankError where it tells of a failure, or the rank died."""
    __tracebackhide__ = True
    try:
        report: Report = rank.connection.recv()
    except (EOFError, ConnectionResetError):
        raise RankError(_how_it_died(rank, task)) from None
    if report.failure:
        # A rank that dies makes its peers fail, and their reports may arrive before its end is noticed.
        ended = wait([peer.process.sentinel for peer in ranks], timeout=patient(1.0))
        dead = next((peer for peer in ranks if peer.process.sentinel in ended), None)
        raise RankError(_how_it_died(dead, task) if dead else f"{task.name_of(rank.index)} failed\n{report.failure}")
    return report


def _how_it_died(rank: Rank, task: Task) -> str:
    """Return the exit code of a rank that has died, and the stack that it wrote if it crashed."""
    rank.process.join(task.timeout)
    stacks = task.stacks_of(rank.index)
    stack = stacks.read_text() if stacks.exists() else ""
    return f"{task.name_of(rank.index)} died with exit code {rank.process.exitcode}\n{stack}"


def _where_they_hang(ranks: list[Rank], task: Task) -> str:
    """Return the stack of each unfinished rank, which faulthandler writes when the rank receives SIGUSR1."""
    asked = [rank for rank in ranks if task.stacks_of(rank.index).exists() and rank.process.pid]
    for rank in asked:
        os.kill(rank.process.pid or 0, signal.SIGUSR1)
    wait_until(lambda: all(task.stacks_of(rank.index).stat().st_size or not rank.process.is_alive() for rank in asked))
    before: list[str] = []
    while (found := [task.stacks_of(rank.index).read_text() for rank in asked]) != before:
        before = found
        time.sleep(0.5)  # no line says that it is the last one: the stack is complete when nothing is added to it
    stacks = [f"{task.name_of(rank.index)} is stuck\n{text}" for rank, text in zip(asked, found, strict=True)]
    return "\n".join([f"{len(ranks)} of {task.world_size} ranks had not returned after {task.timeout:g} s", *stacks])


def _dismiss(ranks: list[Rank], task: Task) -> None:
    """Let every rank end, now that none needs another, and check that it ends without an error."""
    __tracebackhide__ = True
    for rank in ranks:
        rank.connection.send(None)
    for rank in ranks:
        rank.process.join(task.timeout)
        if rank.process.exitcode != 0:
            raise RankError(f"after its report {_how_it_died(rank, task)}")


def _serve(rank: int, task: Task, connection: Connection) -> None:
    """Run a rank: join the others, call the function, report, and stay until every rank has reported.

    A rank that ended earlier would break connections that the others still use: a second failure would hide the first.
    """
    torch.set_num_threads(1)
    hidden = task.stacks_of(rank).with_suffix(".hidden")
    with hidden.open("w") as stacks, connection:
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        hidden.rename(task.stacks_of(rank))  # from now on SIGUSR1 asks for the stack
        # Where the parent was killed, nothing else would end a rank that hangs.
        faulthandler.dump_traceback_later(2 * task.timeout, exit=True, file=stacks)
        connection.send(_report(rank, task))
        connection.recv()
        dist.destroy_process_group()


def _report(rank: int, task: Task) -> Report:
    """Call the task's function on this rank, and return its result or the traceback of its failure."""
    try:
        meeting_point = f"file://{task.folder}/rendezvous"  # not a port, which another run might use
        dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=task.world_size)
        saved = io.BytesIO()
        torch.save(task.function(rank, task.world_size, *task.arguments), saved)
    except BaseException:
        return Report(failure=traceback.format_exc())
    return Report(saved=saved.getvalue())
