"""A lock that keeps two runs from writing in one folder. It ends with its process, however that ends."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class RunLock:
    """The lock of a run's folder: a file in it, which a run holds locked while it writes there."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / ".lock"

    def is_held(self) -> bool:
        """Return whether a run that has not ended writes in the folder."""
        try:
            with self.file.open() as file:  # all ranks may look at once: they share it
                return not _try_to_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock until the `with` statement ends. Raises BlockingIOError if another run holds it."""
        with self.file.open("w") as file:
            if not _try_to_lock(file, fcntl.LOCK_EX):
                raise self.held_by_another()
            try:
                yield
            finally:
                self.file.unlink(missing_ok=True)

    def held_by_another(self) -> OSError:
        """Return the error of a run that finds the lock held."""
        return BlockingIOError(errno.EAGAIN, "another run writes here", str(self.folder))


def _try_to_lock(file: IO[str], how: int) -> bool:
    """Lock the file unless another process has locked it. Returns True too where the file system has no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
