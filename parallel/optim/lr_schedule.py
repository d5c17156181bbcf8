"""The learning rate of each step."""

import math

from parallel.config import SchedulerConfig


def learning_rate(schedule: SchedulerConfig, lr: float, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: a linear warm-up to `lr`, then a decay to min_ratio · lr."""
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    t = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    match schedule.kind:
        case "cosine":
            share = (1 + math.cos(math.pi * t)) / 2
        case "linear":
            share = 1 - t
        case "constant":
            return lr
    return lr * (schedule.min_ratio + (1 - schedule.min_ratio) * share)
