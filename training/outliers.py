"""Losses and norms that are far from those of the steps before."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from training.metrics import MetricsLine

KEYS = {"loss": "loss", "grad_norm": "gradient norm"}
"""The numbers of a step that are watched, and their names on the screen."""

KEPT = 100  # values of each
NEEDED = 20  # values, before one is judged
FAR = 6.0  # standard deviations
RELATIVE = 1e-6  # of the mean: the least standard deviation, for values that are all equal


class Outliers:
    """Marks a loss or a norm that is more than six standard deviations from the mean of the last hundred before it.

    It is judged once there are twenty. What is marked enters the history too: otherwise a run whose level has changed
    for good would have every step marked from then on. Numbers that are not finite do not enter. All ranks have the
    same history, since losses and norms are the same on all; a checkpoint saves it. `log` is given a line for each
    mark.
    """

    def __init__(self, log: Callable[[str], None] = lambda text: None) -> None:
        self.log = log
        self._history: dict[str, deque[float]] = {key: deque(maxlen=KEPT) for key in KEYS}

    def take(self, line: MetricsLine) -> None:
        """Take in the numbers of a step; where one is marked, the line of metrics gets its name under `outliers`."""
        marked = []
        for key, name in KEYS.items():
            value = line[key]
            if value is None or not math.isfinite(value):
                continue
            history = self._history[key]
            if abs(deviations := _deviations(value, history)) > FAR:
                marked.append(key)
                side = "above" if deviations > 0 else "below"
                self.log(
                    f"step {line['step']}: {name} {value:.4g} is {abs(deviations):,.1f} deviations {side} its last"
                    f" {len(history)}"
                )
            history.append(value)
        if marked:
            line["outliers"] = marked

    def state(self) -> dict[str, list[float]]:
        """Return the histories, for JSON, which has every bit of a float."""
        return {key: list(history) for key, history in self._history.items()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` returned; None: an older checkpoint has no history."""
        if state is not None:
            self._history = {key: deque(map(float, state[key]), maxlen=KEPT) for key in KEYS}


def _deviations(value: float, history: deque[float]) -> float:
    """Return by how many standard deviations a value is above the mean of the history; 0 while that is too short."""
    if len(history) < NEEDED:
        return 0.0
    mean = fmean(history)
    deviation = math.sqrt(fmean((x - mean) ** 2 for x in history))
    return (value - mean) / max(deviation, RELATIVE * abs(mean), math.ulp(0.0))
