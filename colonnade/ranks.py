"""The work of a command on its ranks: this process, those that torchrun has started, or new ones on this host."""

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colonnade.process import FAILED, NOT_FINITE, REFUSED, TERMINATED, import_torch, terminate

if TYPE_CHECKING:
    from parallel.engine.context import Place
    from parallel.watch.watch import Watch


@dataclass(frozen=True)
class Prepared:
    """The work of a rank, prepared and checked, before all ranks meet.

    `facts` returns what must be the same on all of them, and `work` is what each does then. `timeout` is
    `train.timeout_seconds`. `modules` are imported once for ranks that are started here.
    """

    facts: Callable[[], Mapping[str, Any]]
    timeout: float
    work: Callable[["Watch"], None]
    modules: Sequence[str]


@dataclass(frozen=True)
class Launch:
    """The place of this process, and the size of the world that it belongs to or is to start.

    `end_if_terminated` ends the process if SIGTERM has come, or if `watch` has found another rank lost: long
    preparations call it again and again.
    """

    place: "Place"
    world_size: int
    end_if_terminated: Callable[[], object]
    watch: "Watch"


def run_on_ranks(
    main: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    prepare: Callable[[Launch], Prepared],
) -> int:
    """Prepare the work and do it, in this process or in `arguments.nprocs` new ones, each of which calls `main`.

    Returns the exit code; a refusal is printed without a traceback.
    """
    # When one rank refuses, torchrun sends SIGTERM to the others at once. They ignore it until they have checked the
    # work themselves, so that rank 0 comes to print why it is refused.
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    if not import_torch():
        return REFUSED
    from parallel.engine.context import Place, watch_of
    from parallel.errors import ColonnadeError, LostRankError, NonFiniteError, RoomError, StorageError
    from parallel.mesh.process_groups import leave
    from parallel.watch.watch import UNWATCHED
    from training.callbacks import CallbackError

    place, watch = Place(), UNWATCHED
    try:
        place = Place.from_environment()
        world_size = arguments.nprocs or place.world_size
        watch = watch_of(place, speaker="launcher" if multiprocessing.parent_process() is not None else "first")
        with watch.refusing(), watch.phase("preparation"):
            prepared = prepare(Launch(place, world_size, lambda: _end_if(ended, watch), watch))
            if watch.is_on:
                watch.meet(prepared.facts(), prepared.timeout)
        signal.signal(signal.SIGTERM, terminate)
        if ended:
            return TERMINATED
        if arguments.nprocs is not None:
            return _start(main, arguments, prepared.modules)
        prepared.work(watch)
        watch.leave()
        leave()
        return 0
    except LostRankError as error:
        return watch.end(error)
    except ColonnadeError as error:
        code = {NonFiniteError: NOT_FINITE, CallbackError: FAILED}.get(type(error), REFUSED)
        watch.leave(f"it {'ends' if code == FAILED else 'refuses'}: {error}", code=code)
        if place.rank == 0 or isinstance(error, StorageError | RoomError):  # these may be of one rank alone
            print(error, file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python removes a handler of ours before the process ends
        return code


def _end_if(terminated: Sequence[int], watch: "Watch") -> None:
    """End the process where it was asked to. Raises LostRankError where another rank is silent."""
    if terminated:
        sys.exit(TERMINATED)
    watch.check()


def _start(main: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, modules: Sequence[str]) -> int:
    """Start the ranks, each of which calls `main`, and return their exit code."""
    from training.spawn import run_ranks

    num_ranks, arguments.nprocs = arguments.nprocs, None
    return run_ranks(main, arguments, num_ranks, preload=["colonnade", "torch", *modules])  # the first finds our own
