"""The logger that writes TensorBoard's event files."""

from typing import TYPE_CHECKING

from training.callbacks import Callback, Run
from training.metrics import MetricsLine
from training.scalars import scalars_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoardLogger(Callback):
    """Writes every number of metrics.jsonl as a scalar of its name into tensorboard/ of the run's folder.

    A resumed run has TensorBoard hide the values of the steps that it takes again.
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.num_steps + 1 if run.num_steps else None
        self._writer = SummaryWriter(run.folder / FOLDER, purge_step=purge, flush_secs=FLUSH_SECONDS)

    def on_step(self, line: MetricsLine) -> None:
        assert self._writer is not None, "on_start comes first"
        for name, value in scalars_of(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def on_end(self, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
