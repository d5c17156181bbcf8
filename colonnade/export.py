"""Write a checkpoint as a Hugging Face directory, with the tokenizer of its run.

    colonnade export runs/NAME --to DIR                             its newest checkpoint
    colonnade export runs/NAME/checkpoints/step_000100 --to DIR     this one

It is what the run itself exports after that step, whatever the layout of the run. One process does it, with one tensor
in memory at a time.
"""

import argparse
import os
import signal
import sys

from colonnade.process import REFUSED, guarded, import_torch, terminate

DTYPES = ("fp64", "fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an export."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder: its newest one")
    parser.add_argument(
        "--to",
        metavar="HF_DIR",
        required=True,
        help="the folder to write: a new or empty one, or an earlier export, which is replaced",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: output.export_dtype of the run's config, else fp32)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export the checkpoint and return the exit code. Raises argparse.ArgumentError under torchrun."""
    if "RANK" in os.environ:
        raise argparse.ArgumentError(None, "one process writes an export: start this without torchrun")
    return guarded(lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> int:
    if not import_torch():
        return REFUSED
    from parallel.engine.context import dtype_name
    from parallel.errors import ColonnadeError
    from parallel.placement.shortage import refusing_without_room
    from parallel.regular_file import without_links
    from training.export import check_target, export_checkpoint, find_saved_model

    signal.signal(signal.SIGTERM, terminate)
    target = without_links(os.path.expanduser(arguments.to))
    try:
        saved = find_saved_model(arguments.checkpoint)
        check_target(target, saved)
        with refusing_without_room(0, "the export"):
            dtype, messages = export_checkpoint(saved, target, arguments.dtype)
    except (ColonnadeError, OSError) as error:
        print(error, file=sys.stderr)
        return error.code if isinstance(error, ColonnadeError) else REFUSED
    print(*messages, f"exported step {saved.step} of {saved.folder}, {dtype_name(dtype)}: {target}", sep="\n")
    return 0
