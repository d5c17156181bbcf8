"""The logger that writes TensorBoard's event files."""

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from training.callbacks import Callback, Run
from training.gaps import Gaps
from training.metrics import MetricsLine
from training.scalars import scalars_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
FLUSH_SECONDS = 10
SECONDS_TO_RETRY = 30.0  # each retry begins another event file


class TensorBoardLogger(Callback):
    """Writes every number of metrics.jsonl as a scalar of its name into tensorboard/ of the run's folder.

    A resumed run has TensorBoard hide the values of the steps that it takes again. Where nothing can be written, as on
    a full disk, the run goes on without it, and tries again later, in another event file. TensorBoard's thread writes
    up to ten seconds after a step: values of the steps before the first one that is named may be missing too.
    """

    def __init__(self) -> None:
        self._run: Run | None = None
        self._writer: SummaryWriter | None = None
        self._gaps = Gaps(FOLDER, "step", print)
        self._retry_at = 0.0
        self._previous_hook: Any = None

    def on_start(self, run: Run) -> None:
        self._run, self._gaps = run, Gaps(f"{run.folder / FOLDER}", "step", run.log)
        self._previous_hook, threading.excepthook = threading.excepthook, self._on_thread_error
        with suppress(OSError):  # the first step says so
            self._writer = self._open(run.num_steps)

    def on_step(self, line: MetricsLine) -> None:
        step = int(line["step"])
        try:
            if self._writer is None:
                if time.monotonic() < self._retry_at:
                    raise OSError("it could not be written before")
                self._writer = self._open(0)
            for name, value in scalars_of(line).items():
                self._writer.add_scalar(name, value, step)
            if self._gaps.is_failing:
                self._writer.flush()
        except OSError as error:
            if self._writer is not None or time.monotonic() >= self._retry_at:
                self._retry_at = time.monotonic() + SECONDS_TO_RETRY
            self._drop()
            self._gaps.fail(error, step)
        else:
            self._gaps.succeed()

    def on_end(self, error: BaseException | None) -> None:
        if self._previous_hook is None:
            return
        try:
            if self._writer is not None:
                self._writer.flush()  # raises what the thread has met since the last step
                self._writer.close()
        except OSError as failure:
            self._gaps.say(f"{self._gaps.name} is incomplete: {failure.strerror}")
            self._drop()
        self._gaps.end()
        threading.excepthook, self._previous_hook = self._previous_hook, None

    def _open(self, num_steps: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        assert self._run is not None, "on_start comes first"
        purge = num_steps + 1 if num_steps else None
        return SummaryWriter(self._run.folder / FOLDER, purge_step=purge, flush_secs=FLUSH_SECONDS)

    def _drop(self) -> None:
        """Close what still can be closed of a writer that has failed."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: its error is raised again by the next call."""
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self._previous_hook(arguments)
