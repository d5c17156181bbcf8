"""The losses of a run so far: what it decides and marks by them, on every rank alike, and saves in checkpoints."""

from dataclasses import dataclass, field

from training.best_loss import BestLoss
from training.outliers import Outliers


@dataclass(frozen=True)
class LossHistory:
    """The lowest validation loss, and the losses and norms of the last steps."""

    best: BestLoss = field(default_factory=BestLoss)
    outliers: Outliers = field(default_factory=Outliers)
