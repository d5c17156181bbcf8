"""Where the time of a step goes: seconds by phase, without a wait of its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch.profiler import record_function

Phase: TypeAlias = Literal["data", "forward", "backward", "transfer", "reduce", "update"]
"""A step's own, in order: the loader's batch and the count of its labels; the stage's layers; sends and receives
between stages; sums of loss and gradients over ranks, with the norm; clipping and AdamW. Collectives inside a layer
belong to `forward` and `backward`."""

PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Clock:
    """`now` notes a moment; `seconds` lie between two of them, and may wait for the second to have come."""

    now: Callable[[], Any]
    seconds: Callable[[Any, Any], float]


class Stopwatch:
    """Time belongs to the phase marked last, until it is read; from then to the next mark the stopwatch stands still.

    A GPU is behind the host that gives it work. There a mark is an event in the current stream, and a phase lasts as
    long as the stream took from one to the next, with its waits for the host and for other ranks. Nothing waits for
    an event before `read`, whose caller has just waited for the step's results.

    While a profiler runs, its trace shows each phase as a range of that name, followed by what `mark` was told of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = (
            _gpu_clock() if device.type == "cuda" else Clock(time.perf_counter, lambda start, end: end - start)
        )
        self._marks: list[tuple[Phase, Any]] = []
        self._range: record_function | None = None

    def mark(self, phase: Phase, detail: object = "") -> None:
        """From now on time belongs to this phase."""
        self._end_range()
        self._marks.append((phase, self._clock.now()))
        if torch.autograd.profiler._is_profiler_enabled:  # a range takes the host 9 µs, even where nobody records it
            self._range = record_function(f"{phase} {detail}".rstrip())
            self._range.__enter__()

    def read(self) -> dict[str, float]:
        """The seconds of every phase since the first mark; the count starts anew."""
        self._end_range()
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        moments = [*(moment for _, moment in self._marks), self._clock.now()]
        for (phase, _), (start, end) in zip(self._marks, pairwise(moments), strict=True):
            found[phase] += self._clock.seconds(start, end)
        self._marks = []
        return found

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def _gpu_clock() -> Clock:
    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return Clock(now, seconds)
