"""The lowest validation loss of a run, which decides what the best checkpoint is and whether a run ends early."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.checkpoint.values import decode, encode
from parallel.errors import shown
from training.metrics import MetricsLine


@dataclass
class BestLoss:
    """The lowest validation loss so far, and how many evaluations in a row have not been lower.

    `step` is the step after which it was computed, 0 before the first evaluation. Every rank takes in the same losses,
    and so decides the same. A checkpoint saves it. `unevaluated` is the line of metrics of the checkpoint's own step,
    where a signal came before its evaluation was done: whoever goes on evaluates first.
    """

    loss: float = math.inf
    step: int = 0
    evaluations_since: int = 0
    unevaluated: MetricsLine | None = None

    def take(self, step: int, loss: float) -> bool:
        """Take in the loss of an evaluation; return whether it is a new lowest one, which NaN never is."""
        if loss < self.loss:
            self.loss, self.step, self.evaluations_since = loss, step, 0
            return True
        self.evaluations_since += 1
        return False

    def __str__(self) -> str:
        return f"{self.loss:.4f} after step {self.step}" if self.step else "infinity"

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint saves, for JSON, which has no infinity."""
        loss = self.loss if math.isfinite(self.loss) else None
        found = {"loss": loss, "step": self.step, "evaluations_since": self.evaluations_since}
        if self.unevaluated is not None:  # of a step that was left out, its loss is NaN
            found["unevaluated"] = encode({"line": self.unevaluated}).json
        return found

    @classmethod
    def restored(cls, state: Mapping[str, Any] | None) -> "BestLoss":
        """Return what `state` was called on; None, which an older checkpoint has: before the first evaluation.

        Raises ValueError for a line that is of no step, CheckpointError for one that cannot be decoded.
        """
        if state is None:
            return cls()
        loss = math.inf if state["loss"] is None else float(state["loss"])
        unevaluated = None if "unevaluated" not in state else _line_of(state["unevaluated"])
        return cls(loss, int(state["step"]), int(state["evaluations_since"]), unevaluated)


def _line_of(saved: Any) -> MetricsLine:
    line = decode(saved, []).get("line") if isinstance(saved, dict) else None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not isinstance(line.get("loss"), float):
        raise ValueError(f"the line of its last step, 'unevaluated', is {shown(saved)}.")
    return line
