"""A run's folder: where everything that it leaves has its place."""

import errno
import fcntl
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from parallel.config import Config
from parallel.errors import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME and what is in it. Of a `resumed` run the folder is gone on with, else an existing one is set aside."""

    path: Path
    resumed: bool

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def trace(self, rank: int) -> Path:
        return self.profile / f"rank_{rank}.json"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank_{rank}.log"

    def check(self) -> None:
        """Raise ConfigError if the folder cannot be written; touch nothing."""
        for blocked in (self.path, *self.path.absolute().parents):
            if blocked.exists() and not blocked.is_dir():
                raise ConfigError(f"output.dir: {self.path}: {blocked} is not a folder. Try another output.dir.")
        if self.is_held():
            raise ConfigError(
                f"output.dir: a run that has not ended writes in {self.path}. Stop it, or set another output.dir."
            )
        standing = next(folder for folder in self.path.absolute().parents if folder.is_dir())
        folders = [standing, self.path] if self.resumed else [standing]  # a folder is renamed in the one around it
        for folder in folders:
            try:
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise ConfigError(
                    f"output.dir: cannot write in {folder}: {error.strerror}. Try another output.dir."
                ) from error

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def is_held(self) -> bool:
        """Whether a run that goes on writes here. Its lock ends with its process, however that ends."""
        try:
            with self.lock.open() as file:  # all ranks may look at once: they share it
                return not _locks(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, no other run may write here."""
        with self.lock.open("w") as file:
            if not _locks(file, fcntl.LOCK_EX):
                raise self._other_run()
            try:
                yield
            finally:
                self.lock.unlink(missing_ok=True)

    def make(self, config: Config) -> Path | None:
        """Make the folder with its config.json, on rank 0 alone; returns the name that an earlier run now has.

        Raises OSError, also where another run has begun to write here since `check`.
        """
        if self.is_held():
            raise self._other_run()
        aside = None if self.resumed or not self.path.exists() else self._set_aside()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        return aside

    def _other_run(self) -> OSError:
        return BlockingIOError(errno.EAGAIN, "another run writes here", str(self.path))

    def _set_aside(self) -> Path:
        """Rename to the first of NAME.1, NAME.2, ... that is free."""
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in count(1))
        return self.path.rename(next(name for name in names if not name.exists()))

    def start_log(self, rank: int) -> logging.Handler:
        """Send what this process logs to logs/rank_N.log: all of ours, and the warnings of others."""
        file = self.log(rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, mode="a" if self.resumed else "w")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        for package in ("parallel", "models", "training"):
            logging.getLogger(package).setLevel(logging.INFO)
        logging.captureWarnings(True)
        return handler


def _locks(file: IO[str], how: int) -> bool:
    """Whether nobody else's lock is in the way: where the file system has no locks, nobody's is."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
