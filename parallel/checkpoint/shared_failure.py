"""Work on files that fails on every rank of an axis if it fails on one."""

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.errors import CheckpointError, ColonnadeError, DiskFullError, NoRoomError, StorageError
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.storage.no_room import disk_error, disk_problem, memory_without_room


@contextmanager
def fail_together(axis: Axis) -> Iterator[None]:
    """Make the block fail on every rank of the axis if it fails on one.

    An OSError on any rank becomes a CheckpointError on each; a DiskFullError where a disk is full, a StorageError where
    it is broken. Any other error is raised as it is on the rank where it happened, and becomes a CheckpointError on the
    others, or a NoRoomError where a memory had no room. The block must contain no collective, which a rank that fails
    would miss.
    """
    problem, own = "", None
    kind: type[ColonnadeError] = CheckpointError
    try:
        with axis.watch.phase("work on files"):
            yield
    except OSError as error:
        problem, kind = disk_problem(error), disk_error(error, CheckpointError)
    except Exception as error:
        problem, own = str(error) if isinstance(error, ColonnadeError) else f"{type(error).__name__}: {error}", error
        if isinstance(error, NoRoomError | StorageError) or memory_without_room(error) is not None:
            problem, kind = f"rank {axis.rank}: {problem.splitlines()[0]}", NoRoomError
    problems = [(problem, kind) for problem, kind in gather_objects((problem, kind), axis) if problem]
    if own is not None:
        raise own
    if problems:
        kinds = {kind for _, kind in problems}
        worst = next(kind for kind in (NoRoomError, DiskFullError, StorageError, CheckpointError) if kind in kinds)
        raise worst("\n".join(dict.fromkeys(problem for problem, _ in problems)))
