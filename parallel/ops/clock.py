"""The clock of a device: time marks in its stream of work, and the seconds between two of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """Three functions that measure time on a device without waiting for it."""

    now: Callable[[], Any]
    """Returns a time mark. On a GPU it is an event that its current stream has yet to reach."""

    is_past: Callable[[Any], bool]
    """Returns whether the device has reached a mark."""

    seconds: Callable[[Any, Any], float]
    """Returns the seconds from one mark to another; the device must have reached both."""

    now_in_graph: Callable[[], Any]
    """Returns a mark that is a part of the graph that is being captured: each replay sets it anew."""


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device: events in the current stream of a GPU, or the host's time."""
    return _gpu_clock() if device.type == "cuda" else _host_clock()


def _host_clock() -> Clock:
    return Clock(time.perf_counter, lambda mark: True, lambda start, end: end - start, time.perf_counter)


def _gpu_clock() -> Clock:
    def now(**options: bool) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, **options)
        event.record()
        return event

    return Clock(
        now,
        lambda event: bool(event.query()),
        lambda start, end: float(start.elapsed_time(end)) / 1000,
        partial(now, external=True),
    )
