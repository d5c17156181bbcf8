"""The screen of a run, on rank 0 alone: its layout, its progress, and a summary at its end."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from parallel.checkpoint.checkpoint import best_checkpoint
from parallel.config import Config
from training.best_loss import BestLoss
from training.callbacks import Callback
from training.console import make_console, print_line
from training.layout_report import print_layout
from training.metrics import MetricsLine
from training.preview import Preview
from training.run_folder import RunFolder
from training.text import duration, epochs_text, plural

if TYPE_CHECKING:
    from rich.progress import Progress

RECENT_STEPS = 20  # the time left is estimated from these


class Screen(Callback):
    """Shows a run; a `quiet` screen, that of every rank but the first, shows nothing.

    `close` must be called at the end: a terminal has a progress bar until then.
    """

    def __init__(self, config: Config, num_training: int, *, quiet: bool) -> None:
        self.config, self.num_training = config, num_training
        self.console = make_console(quiet=quiet)
        self._has_bar = sys.stdout.isatty() and not quiet
        self._bar: Progress | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last: MetricsLine | None = None
        self._validation: float | None = None
        self._tokens, self._seconds, self._began = 0.0, 0.0, time.monotonic()

    def start(self, preview: Preview, messages: Iterable[str]) -> None:
        """Print the messages and the layout, and begin a progress bar if there is a terminal."""
        print_layout(self.console, preview, messages)
        self._began = time.monotonic()
        if self._has_bar:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self.console, expand=True)
            self._bar.add_task("", total=self.config.train.steps)
            self._bar.start()

    def on_step(self, line: MetricsLine) -> None:
        """Move the bar, or else print a line every `log_every` steps."""
        step, steps = int(line["step"] or 0), self.config.train.steps
        seconds = float(line["step_seconds"] or 0)
        self._recent.append(seconds)
        self._last, self._seconds = line, self._seconds + seconds
        self._tokens += seconds * float(line["tokens_per_second"] or 0)
        text = (
            f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
            f"  {duration(statistics.median(self._recent) * (steps - step))} left"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif step % self.config.output.log_every == 0 or step == steps:
            self.print(f"step {step:>{len(str(steps))}}/{steps}  lr {line['lr']:.2e}  {text}")

    def on_evaluate(self, step: int, loss: float) -> None:
        steps = self.config.train.steps
        self._validation = loss
        self.print(f"step {step:>{len(str(steps))}}/{steps}  validation loss {loss:.4f}")

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.print(f"saved {folder}")

    def ended_early(self, best: BestLoss) -> None:
        """Print why the run ends before its last step."""
        self.print(
            f"train.early_stopping: the run ends, since {plural(best.evaluations_since, 'evaluation')} in a row had no"
            f" lower validation loss than {best}"
        )

    def finish(self, folder: RunFolder, steps: int, best: BestLoss) -> None:
        """Print a summary of the run, which has taken `steps` steps, and where its files are."""
        self.close()
        self.print("done")
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, text in (*self._results(steps, best), *_places(folder)):
            table.add_row(name, text)
        self.console.print(table)

    def _results(self, steps: int, best: BestLoss) -> Iterator[tuple[str, str]]:
        """Yield what the steps have come to, by name."""
        if self._last is None:
            yield "steps", f"none left to take: {steps} were taken before"
            return
        samples = self._last["tokens"] // self.config.data.sequence_length
        yield "final loss", f"{self._last['loss']:.4f}"
        if self._validation is not None:
            yield "validation loss", f"{self._validation:.4f}"
        if self.config.output.eval_every:
            yield "its lowest", str(best)
        yield "samples", f"{samples:,}, {epochs_text(samples / self.num_training)}"
        if self._last["nonfinite_steps"]:
            yield "left out", f"{plural(self._last['nonfinite_steps'], 'step')} with a number that was not finite"
        yield "speed", f"{self._tokens / self._seconds:,.0f} tokens/s"
        yield "time", duration(time.monotonic() - self._began)

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        print_line(self.console, text)

    def close(self) -> None:
        """End the progress bar; the terminal is then as it was before."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _places(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """Yield where the files of a run are, by name."""
    places = {
        "metrics": folder.metrics,
        "plot": folder.plot,
        "tensorboard": folder.tensorboard,
        "wandb": folder.wandb,
        "model": folder.export,
    }
    yield from ((name, str(path)) for name, path in places.items() if path.exists())
    if (found := best_checkpoint(folder.path)) is not None:
        yield "best checkpoint", str(found)
