"""Train a language model as a config file says.

    colonnade train                                        one process, the built-in config: a small model
    colonnade train --config FILE --check                  show how a config is laid out, without starting it
    colonnade train --config FILE --nprocs 8               eight processes on this host
    torchrun --nproc-per-node 8 -m colonnade train --config FILE    the same eight, started by torchrun

docs/config.md lists every key of a config, and README.md the files that a run leaves.
"""

# Torch takes seconds to import. So it is imported in the functions that need it, once the arguments have been read:
# --help and a mistyped option need not wait for it.

import argparse
import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING

from colonnade.arguments import add_config, add_resume, count, step_range
from colonnade.process import NOT_FINITE, REFUSED, TERMINATED, guarded, import_torch, terminate

if TYPE_CHECKING:
    from parallel.engine.context import Place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run."""
    add_config(parser)
    add = parser.add_argument
    add("--nprocs", metavar="N", type=count, help="start N processes on this host, without torchrun")
    add_resume(parser)
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


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise argparse.ArgumentError for options that do not go together."""
    problem = None
    if arguments.world is not None and not arguments.check:
        problem = "--world is for --check alone; use --nprocs or torchrun to start processes"
    elif arguments.profile and arguments.check:
        problem = "--profile is for a run, and --check starts none; leave one of the two out"
    elif arguments.nprocs is not None and "RANK" in os.environ:
        problem = "--nprocs is not for torchrun, which has started the processes already; leave one of the two out"
    if problem:
        raise argparse.ArgumentError(None, problem)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code. Raises argparse.ArgumentError."""
    check_arguments(arguments)
    return main(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Do what the arguments say and return the exit code."""
    return guarded(lambda: _launch(arguments))


def _launch(arguments: argparse.Namespace) -> int:
    """Check, or prepare the run and train in this process or in new ones; a refusal is printed without a traceback."""
    # When one rank refuses, torchrun sends SIGTERM to the others at once. They ignore it until they have checked the
    # run themselves, so that rank 0 comes to print why it is refused.
    ended: list[int] = []
    if not arguments.check:
        signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    if not import_torch():
        return REFUSED
    from parallel.engine.context import Place, watch_of
    from parallel.errors import ColonnadeError, LostRankError, NonFiniteError, RoomError, StorageError
    from parallel.mesh.process_groups import leave
    from parallel.watch.watch import UNWATCHED
    from training.config import read_config
    from training.preflight import facts_of_job, modules_of_steps, prepare
    from training.tokenizing import cache_of

    place, watch = Place(), UNWATCHED
    try:
        place = Place.from_environment()
        if arguments.check:
            return _print_layout(arguments, place)
        world_size = arguments.nprocs or place.world_size
        watch = watch_of(place, speaker="launcher" if multiprocessing.parent_process() is not None else "first")
        with watch.refusing(), watch.phase("preparation"):
            config = read_config(arguments.config, arguments.set, world_size)
            cache = cache_of(os.environ, quiet=place.rank != 0, check=lambda: ended and sys.exit(TERMINATED))
            resume, profile, overridden = arguments.resume, arguments.profile, arguments.set
            job = prepare(config, place, resume=resume, profile=profile, overridden=overridden, cache=cache)
            if watch.is_on:
                watch.meet(facts_of_job(job), config.train.timeout_seconds)
        signal.signal(signal.SIGTERM, terminate)
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
        preload = ["colonnade", "torch", "training.run", *modules_of_steps(config)]  # the first one finds our packages
        return run_ranks(main, arguments, world_size, preload=preload)
    except LostRankError as error:
        return watch.end(error)
    except ColonnadeError as error:
        code = NOT_FINITE if isinstance(error, NonFiniteError) else REFUSED
        watch.leave(f"it refuses: {error}", code=code)
        if place.rank == 0 or isinstance(error, StorageError | RoomError):  # these may be of one rank alone
            print(error, file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python removes a handler of ours before the process ends
        return code


def _print_layout(arguments: argparse.Namespace, place: "Place") -> int:
    """Print the layout in the world that was asked for, else in this one, else in the smallest that holds a replica."""
    from training.config import read_config
    from training.console import make_console
    from training.layout_report import print_layout, print_timeline
    from training.preflight import problems_here, read_inputs
    from training.preview import device_messages, preview_of
    from training.tokenizing import cache_of

    world_size = arguments.world or arguments.nprocs or place.world_size
    if world_size == 1 and not (arguments.world or arguments.nprocs):
        world_size = read_config(arguments.config, arguments.set, None).parallel.model_size
    config = read_config(arguments.config, arguments.set, world_size)
    cache = cache_of(os.environ, quiet=place.rank != 0)
    inputs = read_inputs(config, resume=arguments.resume, overridden=arguments.set, cache=cache)
    config = inputs.config
    messages = [*inputs.messages, *device_messages(config), *problems_here(config, place, inputs.resume_from)]
    preview, console = preview_of(config, world_size), make_console(quiet=place.rank != 0)
    print_layout(console, preview, messages)
    print_timeline(console, preview)
    return 0
