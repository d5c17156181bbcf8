"""The newest whole checkpoint of a run: those that are damaged are passed over, and it is said why."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.checkpoint import candidates, step_of
from parallel.checkpoint.index import Index
from parallel.errors import CheckpointError, UnreadableError


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not whole, and the reason. `is_damaged`: no other attempt would read it."""

    folder: Path
    reason: str
    is_damaged: bool = True

    @classmethod
    def by(cls, folder: Path, error: CheckpointError) -> "PassedOver":
        """Return the checkpoint in a folder with the error that a read of it has raised.

        An error of the system, such as an I/O error or a network folder that is gone for a moment, is no damage.
        """
        cause = error.__cause__
        failed = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        return cls(folder, str(error), is_damaged=not failed and not isinstance(error, UnreadableError))

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.reason.replace(f'{self.folder}/', '')}"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint to go on from, and the newer ones that were passed over for it."""

    index: Index
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def messages(self) -> list[str]:
        """The messages about those that were passed over."""
        return [f"passed over {one}" for one in self.passed_over]


def find_newest(checkpoints: Path, passed_over: Sequence[PassedOver] = ()) -> FoundCheckpoint | None:
    """Return the newest checkpoint of which the index and the sizes of the files are in order; None without any.

    `passed_over` are known not to be whole. Raises CheckpointError where there are others and none is whole: to start
    from the beginning then would be to lose the run.
    """
    others = list(passed_over)
    for folder in candidates(checkpoints):
        if folder in (one.folder for one in others):
            continue
        try:
            return FoundCheckpoint(Index.read(folder), tuple(others))
        except CheckpointError as error:
            others.append(PassedOver.by(folder, error))
    if others:
        raise CheckpointError(
            f"none of the checkpoints in {checkpoints} is whole: {' '.join(map(str, others))} Repair one of them, or"
            " begin a new run in another folder."
        )
    return None


@contextmanager
def naming_the_one_before(folder: Path, option: str = "") -> Iterator[None]:
    """Have a CheckpointError about a damaged checkpoint name the one before it, after `option`, if there is one."""
    try:
        yield
    except CheckpointError as error:
        if earlier := previous_checkpoint(folder):
            raise CheckpointError(f"{error} Try {option}{earlier}.") from error
        raise


def previous_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint beside this one that is the last before its step, or None; a damaged one does not count."""
    for other in sorted(candidates(folder.parent), key=step_of, reverse=True):
        try:
            if step_of(other) < step_of(folder):
                return Index.read(other).folder
        except CheckpointError:
            continue
    return None
