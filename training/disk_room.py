"""The room that a run's checkpoints need on the disk, compared with what is free, before the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.costs import parameter_count
from models.shapes import shape_of
from parallel.checkpoint import checkpoint
from parallel.chunk.precision import master_dtype, state_size
from parallel.config import Config
from parallel.engine.context import DTYPES
from parallel.errors import ConfigError, DiskFullError, size_text
from parallel.storage.no_room import free_bytes

IMPOSSIBLE = 0.5
"""The share of a checkpoint for which a disk must have room. Random bits do not compress, and of the bytes of fp32
numbers more than half are random: a file system that compresses could not hold it either. One that is only a bit too
small may be cleared before the first checkpoint is due, so that it is no reason to refuse a run.
"""


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint, all ranks' files together, but for the index and the headers."""
    state = state_size(master_dtype(DTYPES[config.train.dtype]), config.optimizer)
    return parameter_count(shape_of(config)) * state


def check_disk(config: Config, *, num_steps: int = 0) -> None:
    """Raise ConfigError where the disk cannot hold a single checkpoint of a run, after `num_steps` steps."""
    folder, size = Path(config.output.dir), checkpoint_bytes(config)
    free, left = free_bytes(folder), _left(folder, num_steps)
    if free is not None and num_checkpoints(config, num_steps) and left + free < IMPOSSIBLE * size:
        raise ConfigError(
            f"output.dir: a checkpoint needs {size_text(size)}, and {size_text(free)} are free in {folder}. Free some,"
            " try a folder on a larger disk, or output.checkpoint_every=0, which saves none."
        )


def disk_messages(config: Config, *, num_steps: int = 0) -> list[str]:
    """Return a message if the checkpoints of a run, after `num_steps` steps, need more room than its disk has.

    While one is saved there are `keep_checkpoints` before it, and the best one. Those that an earlier run has left in
    the folder count, since they are deleted.
    """
    folder, most = Path(config.output.dir), num_checkpoints(config, num_steps)
    free, size, left = free_bytes(folder), checkpoint_bytes(config), _left(folder, num_steps)
    if free is None or left + free >= most * size:
        return []
    reused = f" beside {size_text(left)} of earlier checkpoints" if left else ""
    return [
        f"output.dir: {most} checkpoints of {size_text(size)} will not fit in the {size_text(free)} free there{reused}:"
        " try a smaller output.keep_checkpoints"
    ]


def _left(folder: Path, num_steps: int) -> int:
    """Return the bytes of the checkpoints that are in a run's folder, where it goes on after `num_steps` steps."""
    return sum(file_bytes(folder)) if num_steps else 0


def num_checkpoints(config: Config, num_steps: int = 0) -> int:
    """Return the most checkpoints that a run has at the same time, after `num_steps` steps."""
    output, due = config.output, 0
    if output.checkpoint_every:
        due = config.train.steps // output.checkpoint_every - num_steps // output.checkpoint_every
    if output.keep_best and output.eval_every:
        due += config.train.steps // output.eval_every - num_steps // output.eval_every
    return min(max(0, due), output.keep_checkpoints + 1 + int(output.keep_best))


@contextmanager
def telling_of_checkpoints(config: Config) -> Iterator[None]:
    """Add to the error of a checkpoint that a full disk had no room for what it needs, and what helps."""
    try:
        yield
    except DiskFullError as error:
        if f"{checkpoint.CHECKPOINTS}/" not in str(error):
            raise
        kept = config.output.keep_checkpoints
        fewer = f", or try less than output.keep_checkpoints={kept}," if kept > 1 else ""
        told = DiskFullError(
            f"{error} A checkpoint needs {size_text(checkpoint_bytes(config))}; the ones before are whole. Free"
            f" some{fewer} and go on with --resume auto."
        )
        told.phase = error.phase
        raise told from error


def file_bytes(run: Path) -> Iterator[int]:
    """Yield the size of each file of the checkpoints that are in a run's folder."""
    for file in (run / checkpoint.CHECKPOINTS).glob("step_*/*"):
        if file.is_file() and not file.is_symlink():
            yield file.stat().st_size
