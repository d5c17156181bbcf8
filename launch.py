"""Train OPT as a config says.

    python launch.py                                           one process, the built-in default
    torchrun --nproc-per-node 8 launch.py --config FILE        eight
    python launch.py --nprocs 8 --config FILE                  the same, started by itself

Torch is imported once the arguments make sense: neither --help nor a typo has to wait for it.
"""

import argparse
import gc
import os
import re
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from parallel.engine.context import Place

INTERRUPTED, TERMINATED, REFUSED = 130, 143, 2  # exit codes


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE", help="a Python file of dicts (default: the built-in one)")
    add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override dotted keys; last wins")
    add("--resume", metavar="auto|DIR", help="go on from this run's newest checkpoint, or from DIR")
    add("--check", action="store_true", help="read, validate, print layout and memory; start nothing")
    add("--world", metavar="N", type=count, help="with --check: how many processes (default: the fewest that fit)")
    add(
        "--profile",
        metavar="A:B",
        type=step_range,
        default=range(0),
        help="trace steps A to B-1, counted from 1 as in metrics.jsonl (a Python slice: without B), on every rank, into"
        " profile/rank_N.json of the run's folder: for chrome://tracing or Perfetto",
    )
    add("--nprocs", metavar="N", type=count, help="start N processes on this host, without torchrun")
    arguments = parser.parse_args(argv)
    if arguments.world is not None and not arguments.check:
        parser.error("--world goes with --check; to start processes say --nprocs, or use torchrun")
    if arguments.profile and arguments.check:
        parser.error("--profile goes with a run, and --check starts none; leave one of the two out")
    if arguments.nprocs is not None and "RANK" in os.environ:
        parser.error("--nprocs under torchrun: it has started the processes already; leave one of the two out")
    return arguments


class _Parser(argparse.ArgumentParser):
    """Under torchrun, rank 0 alone says what is wrong."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            super().error(message)
        sys.exit(REFUSED)


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def step_range(text: str) -> range:
    """'10:13' -> range(10, 13)"""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B; 10:13 traces steps 10, 11 and 12")
    first, stop = int(found[1]), int(found[2])
    if not 1 <= first < stop:
        cure = f"{max(1, first)}:{max(2, first + 1, stop)}"
        raise argparse.ArgumentTypeError(f"{text} has no 1 <= A < B: steps count from 1, B is not included. Try {cure}")
    return range(first, stop)


def main(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code."""
    try:
        return _start(arguments)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _start(arguments: argparse.Namespace) -> int:
    # When one rank refuses, torchrun ends the others at once. They shall come to refuse too, so that rank 0 says why.
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    _import_torch()
    from parallel.engine.context import Place
    from parallel.errors import ColonnadeError, RoomError, StorageError
    from parallel.mesh.mesh import leave
    from training import loop, preflight, spawn

    place = Place()
    try:
        place = Place.from_environment()
        if arguments.check:
            return _check(arguments, place)
        world_size = arguments.nprocs or place.world_size
        config = preflight.read_config(arguments.config, arguments.set, world_size)
        job = preflight.inspect(
            config, place, resume=arguments.resume, profiled=arguments.profile, overridden=arguments.set
        )
        signal.signal(signal.SIGTERM, _terminate)
        if ended:
            return TERMINATED
        if arguments.nprocs is None:
            loop.run(job)
            leave()
            return 0
        arguments.nprocs = None
        return spawn.run_ranks(main, arguments, world_size)
    except ColonnadeError as error:
        if place.rank == 0 or isinstance(error, StorageError | RoomError):  # one rank alone may have it
            print(error, file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python takes a handler of ours away before it has ended
        return REFUSED


def _import_torch() -> None:
    """Import torch, and exempt its objects from garbage collection.

    There are 170,000, and they stay until the process ends: every full collection, also the one at exit, would spend
    0.07 s on them. A process that has imported torch before, as tests have, exempts nothing.
    """
    if "torch" not in sys.modules:
        import torch  # noqa: F401

        gc.freeze()


def _check(arguments: argparse.Namespace, place: "Place") -> int:
    """Print the plan for the world asked for, else the one we are in, else the smallest that holds a replica."""
    from training import preflight
    from training.preview import preview
    from training.report import Screen

    world_size = arguments.world or arguments.nprocs or place.world_size
    if world_size == 1 and not (arguments.world or arguments.nprocs):
        world_size = preflight.read_config(arguments.config, arguments.set, None).parallel.model_size
    config = preflight.read_config(arguments.config, arguments.set, world_size)
    corpus = preflight.read_inputs(config)
    _, notes = preflight.find_start(config, arguments.resume)
    notes += preflight.input_notes(config, corpus)
    plan, screen = preview(config, world_size), Screen(config, quiet=place.rank != 0)
    screen.plan(plan, [*preflight.override_notes(arguments.set), *notes, *preflight.device_notes(config)])
    screen.timeline(plan)
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main(read_arguments()))
