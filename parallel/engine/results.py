"""The results of a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank except for `phases`.

    `loss` is the loss before the update, the mean over `tokens` labels. `grad_norm` is the norm before clipping; None
    where the update was `skipped`: an fp16 gradient overflowed, or a number was not finite and `train.nonfinite` is
    "skip". `lr` is the learning rate of the update. `phases` are the seconds that each phase of the step took on this
    rank. `nonfinite_steps` counts the steps of the run that were left out so far because of a number that is not
    finite; fp16's overflows are not among them.
    """

    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    skipped: bool = False
    phases: Mapping[str, float] = field(default_factory=dict, compare=False)
    nonfinite_steps: int = 0


@dataclass(frozen=True)
class UpdateResult:
    """The result of `ModuleEngine.step`, the same on every rank.

    `grad_norm` is the norm before clipping; None where the update was `skipped`: an fp16 gradient overflowed, or a
    number was not finite and `train.nonfinite` is "skip". `lr` is the learning rate of the update. `nonfinite_steps`
    counts the steps that were left out so far because of a number that is not finite, without fp16's overflows.
    """

    grad_norm: float | None
    lr: float
    skipped: bool = False
    nonfinite_steps: int = 0
