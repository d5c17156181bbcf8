"""Train a language model as a config file says.

    python launch.py                                       one process, the built-in config: a small model
    python launch.py --config FILE --check                 show how a config is laid out, without starting it
    python launch.py --config FILE --nprocs 8              eight processes on this host
    torchrun --nproc-per-node 8 launch.py --config FILE    the same eight, started by torchrun

The files in configs/ are examples, and docs/config.md lists every key. README.md lists the files that a run leaves.
"""

# Torch takes seconds to import. So it is imported in the functions that need it, once the arguments have been read:
# --help and a mistyped option need not wait for it.

import argparse
import gc
import multiprocessing
import os
import re
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from parallel.engine.context import Place

INTERRUPTED, TERMINATED, REFUSED, NOT_FINITE = 130, 143, 2, 4  # exit codes


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line. Exits with code 2 if they make no sense."""
    parser = _Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the config, a Python file of dicts or a run's config.json")
    add(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change keys of the config, as in --set train.steps=20 parallel.pipeline=2; a later value of a key wins",
    )
    add("--nprocs", metavar="N", type=count, help="start N processes on this host, without torchrun")
    add(
        "--resume",
        metavar="auto|DIR",
        help="continue from a checkpoint: auto is the newest one of this run, DIR is a checkpoint or a run's folder."
        " The layout may be another one",
    )
    add(
        "--check",
        action="store_true",
        help="check the config and its inputs, print the layout and the memory of each rank, and start nothing",
    )
    add("--world", metavar="N", type=count, help="with --check: the number of processes (default: the fewest that fit)")
    add(
        "--profile",
        metavar="A:B",
        type=step_range,
        default=range(0),
        help="write a trace of the steps A to B-1 (steps count from 1) on each rank, for chrome://tracing or Perfetto:"
        " profile/rank_N.json in the run's folder",
    )
    arguments = parser.parse_args(argv)
    if arguments.world is not None and not arguments.check:
        parser.error("--world is for --check alone; use --nprocs or torchrun to start processes")
    if arguments.profile and arguments.check:
        parser.error("--profile is for a run, and --check starts none; leave one of the two out")
    if arguments.nprocs is not None and "RANK" in os.environ:
        parser.error("--nprocs is not for torchrun, which has started the processes already; leave one of the two out")
    return arguments


class _Parser(argparse.ArgumentParser):
    """An argument parser that prints what is wrong on rank 0 alone, where torchrun has started several ranks."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            super().error(message)
        sys.exit(REFUSED)


def count(text: str) -> int:
    """Return a number of processes, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def step_range(text: str) -> range:
    """Return the steps of A:B, B not included: '10:13' -> range(10, 13)."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B; 10:13 traces steps 10, 11 and 12")
    first, stop = int(found[1]), int(found[2])
    if not 1 <= first < stop:
        valid = f"{max(1, first)}:{max(2, first + 1, stop)}"
        raise argparse.ArgumentTypeError(
            f"{text} needs 1 <= A < B: steps count from 1, and B is not included. Try {valid}"
        )
    return range(first, stop)


def main(arguments: argparse.Namespace) -> int:
    """Do what the arguments say and return the exit code."""
    from training.streams import safe_output

    try:
        with safe_output():
            return _launch(arguments)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _launch(arguments: argparse.Namespace) -> int:
    """Check, or prepare the run and train in this process or in new ones; a refusal is printed without a traceback."""
    # When one rank refuses, torchrun sends SIGTERM to the others at once. They ignore it until they have checked the
    # run themselves, so that rank 0 comes to print why it is refused.
    ended: list[int] = []
    if not arguments.check:
        signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    if not _import_torch():
        print("torch is not installed in this Python: run `. .venv/bin/activate`, or make venv.", file=sys.stderr)
        return REFUSED
    from parallel.engine.context import Place, watch_of
    from parallel.errors import ColonnadeError, LostRankError, NonFiniteError, RoomError, StorageError
    from parallel.mesh.process_groups import leave
    from parallel.watch.watch import UNWATCHED
    from training.config import read_config
    from training.preflight import facts_of_job, modules_of_steps, prepare

    place, watch = Place(), UNWATCHED
    try:
        place = Place.from_environment()
        if arguments.check:
            return _print_layout(arguments, place)
        world_size = arguments.nprocs or place.world_size
        watch = watch_of(place, speaker="launcher" if multiprocessing.parent_process() is not None else "first")
        with watch.refusing(), watch.phase("preparation"):
            config = read_config(arguments.config, arguments.set, world_size)
            job = prepare(config, place, resume=arguments.resume, profile=arguments.profile, overridden=arguments.set)
            if watch.is_on:
                watch.meet(facts_of_job(job), config.train.timeout_seconds)
        signal.signal(signal.SIGTERM, _terminate)
        if ended:
            return TERMINATED
        if arguments.nprocs is None:
            from training.run import run_job

            run_job(job, watch)
            watch.leave()
            leave()
            return 0
        from training.spawn import run_ranks

        arguments.nprocs = None
        return run_ranks(main, arguments, world_size, preload=modules_of_steps(config))
    except LostRankError as error:
        return watch.end(error)
    except ColonnadeError as error:
        code = NOT_FINITE if isinstance(error, NonFiniteError) else REFUSED
        watch.leave(f"it refuses: {error}", code=code)
        if place.rank == 0 or isinstance(error, StorageError | RoomError):  # these may be of one rank alone
            print(error, file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python removes a handler of ours before the process ends
        return code


def _import_torch() -> bool:
    """Import torch, and exempt its objects from garbage collection. Return False if it is not installed.

    There are 170,000, and they stay until the process ends: every full collection, also the one at exit, would spend
    0.07 s on them. A process that has imported torch before, as tests have, exempts nothing.
    """
    if "torch" not in sys.modules:
        try:
            import torch  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            return False
        gc.freeze()
    return True


def _print_layout(arguments: argparse.Namespace, place: "Place") -> int:
    """Print the layout in the world that was asked for, else in this one, else in the smallest that holds a replica."""
    from training.config import read_config
    from training.console import make_console
    from training.layout_report import print_layout, print_timeline
    from training.preflight import problems_here, read_inputs
    from training.preview import device_messages, preview_of

    world_size = arguments.world or arguments.nprocs or place.world_size
    if world_size == 1 and not (arguments.world or arguments.nprocs):
        world_size = read_config(arguments.config, arguments.set, None).parallel.model_size
    config = read_config(arguments.config, arguments.set, world_size)
    inputs = read_inputs(config, resume=arguments.resume, overridden=arguments.set)
    config = inputs.config
    messages = [*inputs.messages, *device_messages(config), *problems_here(config, place, inputs.resume_from)]
    preview, console = preview_of(config, world_size), make_console(quiet=place.rank != 0)
    print_layout(console, preview, messages)
    print_timeline(console, preview)
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main(read_arguments()))
