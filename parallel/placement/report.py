"""The lines that are logged of a plan: what it keeps where, the step time that it predicts, and the one measured."""

import time
from statistics import median

import torch

from parallel.errors import size_text
from parallel.placement.policy import PlacementPlan
from parallel.placement.room import UNLIMITED

SETTLING, MEASURED = 2, 3  # steps under a new plan: those before the measurement, and those whose median is reported


class StepTimer:
    """Times steps, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begun = 0.0
        self._seconds: list[float] = []  # of each step since `reset`

    def start(self) -> None:
        self._begun = time.perf_counter()

    def elapsed(self) -> float:
        """Wait for the device, and return the seconds since `start`."""
        synchronize(self.device)
        return time.perf_counter() - self._begun

    def record(self) -> None:
        """Add the step that has just ended to those that are measured."""
        self._seconds.append(self.elapsed())

    def reset(self) -> None:
        """Drop the times of all steps so far, since another plan begins."""
        self._seconds = []

    @property
    def is_complete(self) -> bool:
        return len(self._seconds) == SETTLING + MEASURED

    @property
    def median(self) -> float:
        """The seconds of a step, of which one that was held up says nothing."""
        return median(self._seconds[SETTLING:])


def predicted_seconds(
    step: float, *, computing: float, spared: float, updates: tuple[float, float], streamed: float
) -> float:
    """Return the seconds of a step under a new plan, from those of the profiled step.

    `computing` of the profiled step's seconds were computation, of which the plan spares the waits for parameters that
    will be on the device. The rest was for states that are offloaded: `updates` has the seconds of the profiled step's
    update, and of the one under the plan. What else there was falls to `streamed`, the fraction of all states that are
    still offloaded. A profiled step waits for its whole update, and so do the steps that are measured under a plan.
    After these a forward begins while the update goes on, and steps are shorter.
    """
    profiled, planned = updates
    return computing - spared + (step - computing - profiled) * streamed + planned


def describe_plan(plan: PlacementPlan, num_chunks: int, budget: int, seconds: float) -> str:
    num_on_disk = num_chunks - plan.num_host_states
    on_disk = f", states of {num_on_disk} on the disk" if num_on_disk else ""
    limit = f" of {size_text(budget)}" if budget < UNLIMITED else ""
    return (
        f"placement: states of {plan.num_device_states} and parameters of {plan.num_device_parameters} of"
        f" {num_chunks} chunks stay on the device{on_disk}; predicted peak {size_text(plan.peak)}{limit},"
        f" a step {seconds:.3f} s"
    )


def describe_measurement(device: torch.device, seconds: float) -> str:
    """Return a line with the seconds of a step, and the peak memory of a GPU since the plan was made."""
    peak = f"peak {size_text(torch.cuda.max_memory_allocated(device))}, " if device.type == "cuda" else ""
    return f"placement: measured {peak}a step {seconds:.3f} s"


def synchronize(device: torch.device) -> None:
    """Wait, on the host, for all work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
