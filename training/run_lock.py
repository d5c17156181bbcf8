"""A lock that keeps two runs from writing in one folder. It ends with its process, however that ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import ConfigError
from parallel.regular_file import open_regular, with_key
from parallel.storage.file_lock import open_lock, try_to_lock


@dataclass(frozen=True)
class RunLock:
    """The lock of a run's folder: a file in it, which a run holds locked while it writes there."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / ".lock"

    def is_held(self) -> bool:
        """Return whether a run that has not ended writes in the folder."""
        if not os.path.lexists(self.file):
            return False
        try:
            with open_regular(self.file, with_key(ConfigError, "output.dir")) as file:
                return not try_to_lock(file, fcntl.LOCK_SH)  # all ranks may look at once: they share it
        except ConfigError:
            if os.path.lexists(self.file):
                raise
            return False  # that run has ended meanwhile

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock until the `with` statement ends. Raises BlockingIOError if another run holds it."""
        with open_lock(self.file) as file:
            if not try_to_lock(file):
                raise self.held_by_another()
            try:
                yield
            finally:
                self.file.unlink(missing_ok=True)

    def held_by_another(self) -> OSError:
        """Return the error of a run that finds the lock held."""
        return BlockingIOError(errno.EAGAIN, "another run writes here", str(self.folder))
