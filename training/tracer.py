"""Chrome traces of chosen steps, for chrome://tracing or Perfetto."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.errors import ConfigError
from parallel.storage.no_room import disk_problem, naming
from parallel.storage.replaced_file import replacing

log = logging.getLogger(__name__)


def steps_to_trace(asked: range, *, taken: int, steps: int) -> tuple[range, list[str]]:
    """Return those of the steps asked for that a run of `steps` will take after the `taken` ones, and messages.

    Steps are counted from 1. Raises ConfigError if the run ends before the first of the steps asked for.
    """
    if not asked:
        return asked, []
    text = f"{asked.start}:{asked.stop}"
    if asked.start > steps:
        raise ConfigError(
            f"--profile {text}: step {asked.start} is past the last, train.steps={steps}. Try {steps}:{steps + 1}."
        )
    coming = range(max(asked.start, taken + 1), min(asked.stop, steps + 1))
    return coming, [] if coming else [f"--profile {text}: nothing to trace, {taken} of {steps} steps were taken before"]


class Tracer:
    """Writes to `file` a trace of `steps`, counted from 1: what this rank and its GPU did, by name.

    The profiler exists from before the first of these steps until after the last, and around other steps there is none.
    `say` prints that the file is written, or why it is not: the run goes on without it.
    """

    def __init__(self, steps: range, file: Path, device: torch.device, *, say: Callable[[str], None]) -> None:
        self.steps, self.file, self.device, self.say = steps, file, device, say
        self._profiler: profile | None = None

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        """Trace a training step, the body of the `with` statement, if it is one of those asked for."""
        if step not in self.steps:
            yield
            return
        if self._profiler is None:
            self._profiler = profile(activities=self._activities())
            self._profiler.start()
        with record_function(f"step {step}"):
            yield
        if step == self.steps[-1]:
            profiler = self._profiler
            self.close()
            try:
                self._write(profiler)
            except OSError as error:
                log.warning("no trace: %s", disk_problem(error))
                self.say(f"no trace: {disk_problem(error)}")
            else:
                self.say(f"traced: {self.file}")

    def _write(self, profiler: profile) -> None:
        """Write the trace, whole or not at all. Raises OSError."""
        with naming(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.file), replacing(self.file) as temporary:
            try:
                profiler.export_chrome_trace(str(temporary))
                check_whole(temporary)
            except RuntimeError as error:
                raise OSError(errno.EIO, str(error).splitlines()[0]) from error
            finally:
                for left in temporary.parent.glob(f"{temporary.name}?*"):  # torch writes into one more file beside it
                    left.unlink()

    def close(self) -> None:
        """Stop the profiler if a run ends during its traced steps: a process that exits while it runs may crash."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _activities(self) -> list[ProfilerActivity]:
        gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        return [ProfilerActivity.CPU, *gpu]


def check_whole(file: Path) -> None:
    """Raise OSError if a JSON file is missing or was cut: the profiler does not tell that its disk was full."""
    content = b""
    if file.exists():
        with file.open("rb") as written:
            written.seek(max(0, file.stat().st_size - 64))
            content = written.read()
    if not content.rstrip().endswith(b"}"):
        raise OSError(errno.ENOSPC, "not all of it could be written, perhaps since the disk is full")
