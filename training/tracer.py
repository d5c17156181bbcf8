"""Chrome traces of chosen steps, for chrome://tracing or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.errors import ConfigError


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
    `on_written` is called with the file once it is written.
    """

    def __init__(self, steps: range, file: Path, device: torch.device, *, on_written: Callable[[Path], None]) -> None:
        self.steps, self.file, self.device, self.on_written = steps, file, device, on_written
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
            self.file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.file))
            self.on_written(self.file)

    def close(self) -> None:
        """Stop the profiler if a run ends during its traced steps: a process that exits while it runs may crash."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _activities(self) -> list[ProfilerActivity]:
        gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        return [ProfilerActivity.CPU, *gpu]
