"""The file metrics.jsonl of a run, while it is written."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path

from parallel.storage.no_room import write_whole
from training.callbacks import Callback, Run
from training.gaps import Gaps
from training.metrics import MetricsLine


class MetricsFile(Callback):
    """Writes metrics.jsonl. Lines of steps that a resumed run takes again are removed when it starts.

    Every line is valid JSON, so NaN and the infinities become null. When `on_step` returns, the operating system has
    the line, so it is not lost if the process is killed. Where the file cannot be written, as on a full disk, the run
    goes on without it, and each step tries again: no line is ever cut, and the user is told which ones are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gaps = Gaps(str(path), "step", print)
        self._file: int | None = None  # its descriptor
        self._last = 0  # the last step whose line may stay when the file is opened

    def on_start(self, run: Run) -> None:
        self._gaps = Gaps(str(self.path), "step", run.log)
        self._last = run.num_steps
        with suppress(OSError):  # the first step tries again, and says so
            self._open()

    def on_step(self, line: MetricsLine) -> None:
        step = int(line["step"])
        try:
            write_whole(self._open(), _encode(line))
        except OSError as error:
            self._gaps.fail(error, step)
        else:
            self._gaps.succeed()

    def on_end(self, error: BaseException | None) -> None:
        if self._file is not None:
            descriptor, self._file = self._file, None
            try:
                os.close(descriptor)
            except OSError as failure:  # some file systems tell only now
                self._gaps.say(f"{self.path} may be incomplete: {failure.strerror}")
        self._gaps.end()

    def _open(self) -> int:
        """Return the descriptor of the file, which is opened and cut after the last line that stays, if it is not."""
        if self._file is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, _bytes_of_steps(self.path, self._last) if self._last else 0)
            except BaseException:
                os.close(descriptor)
                raise
            self._file = descriptor
        return self._file


def _bytes_of_steps(path: Path, last: int) -> int:
    """Return the bytes of the lines up to that of step `last`. A last line that a crash cut short is left out."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or int(json.loads(line)["step"] or 0) > last:
                break
            size += len(line)
    return size


def _encode(line: MetricsLine) -> bytes:
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
    return (json.dumps(finite, allow_nan=False) + "\n").encode()
