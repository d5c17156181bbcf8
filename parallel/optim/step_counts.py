"""Steps, counted by their outcomes. One whose numbers are not finite updates nothing, which the device decides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from parallel.config import TrainConfig
from parallel.optim.loss_scale import LossScale

MOST_IN_A_ROW = 10
"""The steps in a row that are left out with `train.nonfinite='skip'` before the run ends."""


class Outcome(Enum):
    """The outcomes of a step."""

    UPDATED = auto()
    OVERFLOW = auto()  # an fp16 gradient was too large for the loss scale, which is lower now
    LEFT_OUT = auto()  # loss or gradient is not finite, and the run goes on
    STOPS = auto()  # the same, and the run ends


def found_inf(*numbers: Tensor) -> Tensor:
    """Return an fp32 scalar on the device of these scalars: 1 where one of them is not finite, else 0.

    It is what torch's fused optimizers and its GradScaler call `found_inf`: where it is 1, nothing is updated.
    """
    return (~torch.stack([x.detach().double() for x in numbers]).isfinite().all()).float()


@dataclass
class StepCounts:
    """Counts the steps of a run by their outcomes, which follow from loss and gradient norm once the host has them.

    Every rank has the same two numbers, and so counts the same. A gradient that is not finite, though the loss is, is
    an overflow of fp16 as long as the loss scale can fall; any other step with a number that is not finite is left out.
    `say` is given a line for each of them on the first rank.
    """

    policy: str  # train.nonfinite
    loss_scale: LossScale = field(default_factory=LossScale)
    num_steps: int = 0
    num_updates: int = 0  # the position in the schedule of the learning rate
    num_left_out: int = 0  # without fp16's overflows
    in_a_row: int = 0  # left out since the last update
    say: Callable[[str], None] = lambda text: None

    @classmethod
    def of(cls, config: TrainConfig) -> "StepCounts":
        """Return the counts before the first step."""
        return cls(config.nonfinite, LossScale.for_precision(config.precision))

    def count(self, loss: float, norm: float) -> Outcome:
        """Count a step with these numbers, adapt the loss scale, and return the step's outcome."""
        self.num_steps += 1
        is_overflow = isfinite(loss) and not isfinite(norm) and self.loss_scale.can_fall
        if is_overflow:
            self.loss_scale.update(overflow=True)
            return Outcome.OVERFLOW
        if isfinite(loss) and isfinite(norm):
            self.loss_scale.update(overflow=False)
            self.num_updates, self.in_a_row = self.num_updates + 1, 0
            return Outcome.UPDATED
        self.num_left_out, self.in_a_row = self.num_left_out + 1, self.in_a_row + 1
        stops = self.policy == "stop" or self.in_a_row >= MOST_IN_A_ROW
        return Outcome.STOPS if stops else Outcome.LEFT_OUT

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint saves, for JSON."""
        scale = self.loss_scale
        return {
            "step": self.num_steps,
            "updates": self.num_updates,
            "nonfinite_steps": self.num_left_out,
            "nonfinite_in_a_row": self.in_a_row,
            "loss_scale": scale.scale if scale.is_dynamic else None,
            "good_steps": scale.good_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, perhaps in another precision. An older one lacks what was left out."""
        self.num_steps, self.num_updates = int(state["step"]), int(state["updates"])
        self.num_left_out, self.in_a_row = (int(state.get(f"nonfinite_{key}", 0)) for key in ("steps", "in_a_row"))
        if self.loss_scale.is_dynamic and state["loss_scale"] is not None:  # None: saved in another precision
            self.loss_scale.scale, self.loss_scale.good_steps = state["loss_scale"], int(state["good_steps"])


def numbers_text(loss: float | None, norm: float | None) -> str:
    """Return which of these numbers of a step is not finite, as text: "the loss is nan"."""
    numbers = {"the loss": loss, "the gradient's norm": norm}
    return " and ".join(f"{name} is {x}" for name, x in numbers.items() if x is not None and not isfinite(x))
