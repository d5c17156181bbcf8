"""Where the time of a step goes: seconds by phase, without a wait of its own."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch.profiler import record_function

from parallel.ops.clock import clock_of

Phase: TypeAlias = Literal["data", "forward", "backward", "transfer", "reduce", "update"]
"""A step's own, in order: the loader's batch and the count of its labels; the stage's layers; sends and receives
between stages; sums of loss and gradients over ranks, with the norm; clipping and AdamW. Collectives inside a layer
belong to `forward` and `backward`."""

PHASES: tuple[Phase, ...] = get_args(Phase)


class Stopwatch:
    """Time belongs to the phase marked last, until it is read; from then to the next mark the stopwatch stands still.

    A GPU is behind the host that gives it work. There a mark is an event in the current stream, and a phase lasts as
    long as the stream took from one to the next, with its waits for the host and for other ranks. Nothing is ever
    waited for: what the GPU has not come to yet counts in the next reading.

    While a profiler runs, its trace shows each phase as a range of that name, followed by what `mark` was told of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_of(device)
        self._marks: list[tuple[Phase | None, Any]] = []  # None: standing still
        self._range: record_function | None = None

    def mark(self, phase: Phase, detail: object = "") -> None:
        """From now on time belongs to this phase."""
        self._end_range()
        self._marks.append((phase, self._clock.now()))
        if torch.autograd.profiler._is_profiler_enabled:  # a range takes the host 9 µs, even where nobody records it
            self._range = record_function(f"{phase} {detail}".rstrip())
            self._range.__enter__()

    def read(self) -> dict[str, float]:
        """The seconds of every phase since the last reading, as far as the device has got."""
        self._end_range()
        self._marks.append((None, self._clock.now()))
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        while len(self._marks) > 1 and self._clock.is_past(self._marks[1][1]):
            phase, start = self._marks.pop(0)
            if phase is not None:
                found[phase] += self._clock.seconds(start, self._marks[0][1])
        return found

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
