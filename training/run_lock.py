"""A lock that keeps two runs from writing in one folder. It ends with its process, however that ends."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parallel.storage.file_lock import try_to_lock


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
                return not try_to_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock until the `with` statement ends. Raises BlockingIOError if another run holds it."""
        with self.file.open("w") as file:
            if not try_to_lock(file):
                raise self.held_by_another()
            try:
                yield
            finally:
                self.file.unlink(missing_ok=True)

    def held_by_another(self) -> OSError:
        """Return the error of a run that finds the lock held."""
        return BlockingIOError(errno.EAGAIN, "another run writes here", str(self.folder))
