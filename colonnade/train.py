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
import os
from functools import partial
from typing import TYPE_CHECKING

from colonnade import check
from colonnade.arguments import add_config, add_resume, count, step_range
from colonnade.process import guarded
from colonnade.ranks import run_on_ranks
from colonnade.work import Launch, Prepared

if TYPE_CHECKING:
    from parallel.watch.watch import Watch
    from training.attempt import Attempt


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
    add(
        "--debug-comm",
        action="store_true",
        help="compare every collective between its ranks before it begins, and name those that differ; slow",
    )
    add("--world", metavar="N", type=count, help="with --check: the number of processes (default: the fewest that fit)")
    add(
        "--profile",
        metavar="A:B",
        type=step_range,
        default=range(0),
        help="write a trace of the steps A to B-1 (steps count from 1) on each rank, for chrome://tracing or Perfetto:"
        " profile/rank_N.json in the run's folder, beside the times of its actions, which colonnade timeline draws",
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
    if arguments.check:
        return check.main(arguments)
    return guarded(lambda: run_on_ranks(main, arguments, partial(_prepare, arguments)))


def _prepare(arguments: argparse.Namespace, launch: Launch) -> Prepared:
    """Read the config and all that the run needs, and check it. Raises ColonnadeError."""
    from parallel.engine.stop_signals import do_nothing
    from parallel.placement.shortage import refusing_without_room
    from training.attempt import in_own_folder, resume_of
    from training.config import read_config
    from training.preflight import facts_of_job, modules_of_steps, prepare
    from training.tokenizing import cache_of

    place = launch.place
    config = read_config(arguments.config, arguments.set, launch.world_size)
    launch.watch.set_timeout(config.train.timeout_seconds)
    cache = cache_of(os.environ, quiet=place.rank != 0, check=launch.end_if_asked)
    start = launch.history.start()
    resume = resume_of(start, config, arguments.resume)
    with refusing_without_room(place.rank, "reading the data"):
        job = prepare(config, place, resume=resume, profile=arguments.profile, overridden=arguments.set, cache=cache)
    job = in_own_folder(job, start)
    facts = partial(facts_of_job, job, debug_comm=arguments.debug_comm)

    def work(watch: "Watch", attempt: "Attempt") -> None:
        from training.run import run_job

        attempt.stop.tell(do_nothing)  # until the engine is made, which tells the other ranks
        run_job(job, watch, attempt=attempt, debug_comm=arguments.debug_comm)

    modules = ("training.run", *modules_of_steps(config))
    return Prepared(facts, config.train.timeout_seconds, work, modules)
