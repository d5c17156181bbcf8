"""The log of a rank: logs/rank_N.log."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel.storage.no_room import write_whole
from training.callbacks import Callback
from training.gaps import Gaps
from training.metrics import MetricsLine

PACKAGES = ("parallel", "models", "training")


class StepLog(Callback):
    """Logs the metrics of each step and the checkpoints, on every rank."""

    on_every_rank = True

    def on_step(self, line: MetricsLine) -> None:
        logging.getLogger(__name__).info("%s", line)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        logging.getLogger(__name__).info("saved %s", folder)


class LogHandler(logging.Handler):
    """Writes messages to a file, each whole or not at all.

    (logging's own handler prints a traceback for each message that a full disk does not take, and cuts it.) Where the
    file cannot be written the program goes on without it, and each message tries again.
    """

    def __init__(self, file: Path, *, append: bool, say: Callable[[str], None]) -> None:
        super().__init__()
        self._file, self._flags = file, os.O_APPEND if append else os.O_APPEND | os.O_TRUNC
        self._gaps = Gaps(str(file), "message", say)
        self._descriptor: int | None = None
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        try:
            text = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # arguments that do not fit the message, of any package
            self.handleError(record)
            return
        try:
            write_whole(self._open(), text)
        except OSError as error:
            self._gaps.fail(error, self._count)
        else:
            self._gaps.succeed()

    def close(self) -> None:
        super().close()
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):
                os.close(descriptor)
        self._gaps.end()

    def _open(self) -> int:
        if self._descriptor is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | self._flags
            self._descriptor = os.open(self._file, flags, 0o666)
        return self._descriptor


def say_on_stderr(text: str) -> None:
    """Print a line on standard error, which may be closed, or a file on the same full disk."""
    with suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def log_file(file: Path, *, append: bool, say: Callable[[str], None] = say_on_stderr) -> Iterator[None]:
    """Write to `file` what this process logs until the `with` statement ends, and the traceback of what ended it.

    That is every message of this project's packages from INFO up, and the warnings of other packages. `say` prints a
    line where the file cannot be written.
    """
    handler = LogHandler(file, append=append, say=say)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        logging.getLogger(__name__).error("ended by %s", type(error).__name__, exc_info=error)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
