"""The clock of a device: moments in its stream of work, and the seconds between them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """`now` notes a moment, which `is_past` once it has come; `seconds` lie between two that are past."""

    now: Callable[[], Any]
    is_past: Callable[[Any], bool]
    seconds: Callable[[Any, Any], float]


def clock_of(device: torch.device) -> Clock:
    """On a GPU a moment is when its current stream comes to it."""
    return _gpu_clock() if device.type == "cuda" else _host_clock()


def _host_clock() -> Clock:
    return Clock(time.perf_counter, lambda moment: True, lambda start, end: end - start)


def _gpu_clock() -> Clock:
    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Clock(now, lambda event: bool(event.query()), lambda start, end: float(start.elapsed_time(end)) / 1000)
