"""Draw when each rank does what: the plan of a config's pipeline, and a run as it happened below it.

    colonnade timeline --config FILE --out plan.svg                     the plan, by estimated costs
    colonnade timeline --measured runs/NAME --out run.svg               beside a step that was trained with --profile
    colonnade timeline --config FILE --out plan.csv                     the plan as a file, to be changed and run:
                                                                        parallel.pipeline.schedule="plan.csv"

The picture shows the idle time of the ranks, and how many microbatches each has in flight. Nothing is started.
"""

import argparse
import os
import sys
from pathlib import Path

from colonnade.arguments import add_config, count
from colonnade.process import REFUSED, guarded, import_torch

KINDS = (".svg", ".csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a timeline."""
    add_config(parser)
    parser.add_argument(
        "--world", metavar="N", type=count, help="the number of processes (default: the fewest that fit, or the run's)"
    )
    parser.add_argument(
        "--measured",
        metavar="RUN",
        help="a run's folder: draw one of the steps that it has traced (train --profile A:B), of median length. Without"
        " --config its own config is used",
    )
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="the file to write: FILE.svg is a picture, FILE.csv is the plan"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the timeline and return the exit code. Raises argparse.ArgumentError for options that do not fit."""
    suffix = Path(arguments.out).suffix.lower()
    if suffix not in KINDS:
        raise argparse.ArgumentError(None, f"--out: {arguments.out!r} ends in neither .svg nor .csv. Try timeline.svg")
    if suffix == ".csv" and arguments.measured is not None:
        raise argparse.ArgumentError(None, "--measured is for a picture; with --out FILE.csv leave it out")
    if "RANK" in os.environ:
        raise argparse.ArgumentError(None, "one process draws a timeline: start this without torchrun")
    return guarded(lambda: _draw(arguments))


def _draw(arguments: argparse.Namespace) -> int:
    """Write the file, and print its name; a refusal is printed without a traceback."""
    if not import_torch():
        return REFUSED
    from parallel.errors import ColonnadeError

    try:
        _write(arguments)
    except ColonnadeError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


def _write(arguments: argparse.Namespace) -> None:
    from training.config import read_config
    from training.measured import read_measured
    from training.preview import preview_of
    from training.timelines import check_writable, picture, schedule_csv, write

    target = Path(arguments.out)
    check_writable(target)
    run = None if arguments.measured is None else Path(arguments.measured)
    measured = None if run is None else read_measured(run)
    config_file = arguments.config or (None if run is None else str(run / "config.json"))
    world_size = arguments.world or (None if measured is None else measured.world_size)
    if world_size is None:
        world_size = read_config(config_file, arguments.set, None).parallel.model_size
    preview = preview_of(read_config(config_file, arguments.set, world_size), world_size)
    write(
        schedule_csv(preview) if target.suffix.lower() == ".csv" else picture(preview, measured, run or Path()), target
    )
    print(f"written: {target}")
