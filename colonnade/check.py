"""Show how a config is laid out, without starting it, as `colonnade train --check` does.

    colonnade check --config FILE              in the smallest world that holds the model
    colonnade check --config FILE --world N    in a world of N processes

It prints the layout, the bytes on each rank, and the timeline of a pipeline.
"""

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from colonnade.arguments import add_config, add_resume, count
from colonnade.process import REFUSED, guarded, import_torch

if TYPE_CHECKING:
    from parallel.engine.context import Place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a check."""
    add_config(parser)
    add_resume(parser)
    parser.add_argument(
        "--world", metavar="N", type=count, help="the number of processes (default: the fewest that fit)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the layout, the memory of each rank and the timeline, and return the exit code."""
    return main(argparse.Namespace(**vars(arguments), nprocs=None))


def main(arguments: argparse.Namespace) -> int:
    """Do what `run` does, for the arguments of `train`, among which are --world and --nprocs."""
    return guarded(lambda: _check(arguments))


def _check(arguments: argparse.Namespace) -> int:
    """Print what a config comes to; a refusal is printed without a traceback."""
    if not import_torch():
        return REFUSED
    from parallel.engine.context import Place
    from parallel.errors import ColonnadeError

    place = Place()
    try:
        place = Place.from_environment()
        _print_layout(arguments, place)
        return 0
    except ColonnadeError as error:
        if place.rank == 0:
            print(error, file=sys.stderr)
        return REFUSED


def _print_layout(arguments: argparse.Namespace, place: "Place") -> None:
    """Print the layout in the world that was asked for, else in this one, else in the smallest that holds a replica."""
    from training.config import read_config
    from training.console import make_console
    from training.layout_report import print_layout
    from training.pipeline_report import print_pipeline
    from training.preflight import problems_here, read_inputs
    from training.preview import device_messages, preview_of, save_messages
    from training.tokenizing import cache_of

    world_size = arguments.world or arguments.nprocs or place.world_size
    if world_size == 1 and not (arguments.world or arguments.nprocs):
        world_size = read_config(arguments.config, arguments.set, None).parallel.model_size
    config = read_config(arguments.config, arguments.set, world_size)
    cache = cache_of(os.environ, quiet=place.rank != 0)
    inputs = read_inputs(config, resume=arguments.resume, overridden=arguments.set, cache=cache)
    config = inputs.config
    messages = [*inputs.messages, *device_messages(config), *problems_here(config, place, inputs.found)]
    on_host = place.local_world_size if place.world_size == world_size else world_size
    messages += save_messages(config, replace(place, world_size=world_size, local_world_size=on_host))
    preview, console = preview_of(config, world_size), make_console(quiet=place.rank != 0)
    print_layout(console, preview, messages)
    print_pipeline(console, preview)
