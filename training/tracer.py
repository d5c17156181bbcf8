"""Chrome traces of chosen steps, for chrome://tracing or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Tracer:
    """Leaves in `file` a trace of `steps`, numbered from 1: what this rank and its GPU did, by name.

    The profiler lives from before the first of them until after the last; around other steps there is none. `done` is
    called once the file is written.
    """

    def __init__(self, steps: range, file: Path, device: torch.device, done: Callable[[], None]) -> None:
        self.steps, self.file, self.device, self.done = steps, file, device, done
        self._profiler: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around a training step: its range in the trace, if it is one of those asked for."""
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
            self.done()

    def close(self) -> None:
        """End the profiler, should a run break off among its steps: a process that exits with it alive may crash."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _activities(self) -> list[ProfilerActivity]:
        gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        return [ProfilerActivity.CPU, *gpu]
