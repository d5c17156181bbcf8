"""The phases of a step, and a stopwatch that measures their seconds without waiting for a device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch.profiler import record_function

from parallel.ops.clock import clock_of

Phase: TypeAlias = Literal["data", "forward", "backward", "transfer", "reduce", "update"]
"""The phases of a step, in order.

`data` is the loader's batch and the count of its labels, `forward` and `backward` the stage's layers with their
collectives, `transfer` the sends and receives between stages, `reduce` the sums of loss and gradients over ranks and
the norm, `update` clipping and AdamW.
"""

PHASES: tuple[Phase, ...] = get_args(Phase)

Mark: TypeAlias = tuple[Phase | None, object, Any]
"""The phase that begins, or None where one ends, its detail, and the time on the clock of the device."""


class Stopwatch:
    """Measures the time of each phase: a phase lasts from its mark to the next mark or reading.

    From a reading to the next mark no time is counted. A GPU runs behind the host that gives it work: there a mark is
    an event in the current stream, and a phase is the stream's time between two events, with its waits for the host and
    for other ranks. The stopwatch never waits: what the GPU has not reached yet is counted in the next reading.

    `on_phase` is called with each phase that begins, and with "" when one ends and none begins. While a profiler runs,
    its trace shows each phase as a range of that name, followed by the detail that `mark` had.
    """

    def __init__(self, device: torch.device, on_phase: Callable[[str], object] = lambda phase: None) -> None:
        self._clock, self._on_phase = clock_of(device), on_phase
        self._marks: list[tuple[Phase | None, Any]] = []  # None: no phase, from here no time is counted
        self._range: record_function | None = None
        self._recorded: list[Mark] | None = None

    @property
    def is_observed(self) -> bool:
        """True if somebody wants each mark with its detail: a profiler, or `recording`."""
        return torch.autograd.profiler._is_profiler_enabled or self._recorded is not None

    def mark(self, phase: Phase, detail: object = "") -> None:
        """End the phase before, and begin this one. `detail`: what the trace shows beside its name."""
        self._end_range()
        self._on_phase(phase)
        self._take(phase, detail)
        if torch.autograd.profiler._is_profiler_enabled:  # a range takes the host 9 µs, even if it is not recorded
            self._range = record_function(f"{phase} {detail}".rstrip())
            self._range.__enter__()

    @property
    def phase(self) -> str:
        """The phase that the host is in, or nothing."""
        return self._marks[-1][0] or "" if self._marks else ""

    def mark_in_graph(self, phase: Phase | None) -> Mark:
        """Return a mark that is a part of the graph that is being captured. Each replay passes it to `take`."""
        return phase, "", self._clock.now_in_graph()

    def mark_ahead(self, phase: Phase) -> Mark:
        """Return a mark of now for a step that has not begun: `take` is passed it by that step, if it comes."""
        return phase, "", self._clock.now()

    def take(self, marks: Sequence[Mark], *, ahead: bool = False) -> None:
        """Take the marks of a graph that has been launched. They count until its next replay, before which the device
        has reached them, and `read` has read them; so a mark must follow them before the host waits for the device.

        `ahead`: the graph was launched right after the last reading, so its marks come before all that have followed.
        """
        self._end_range()
        at = len(self._marks)
        while ahead and at and self._marks[at - 1][0] is not None:
            at -= 1
        for phase, _, _ in marks:
            self._on_phase(phase or "")
        self._marks[at:at] = [(phase, time) for phase, _, time in marks]

    def read(self) -> dict[str, float]:
        """Return the seconds of every phase since the last reading, as far as the device has come."""
        self._end_range()
        self._on_phase("")
        self._take(None)
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        while len(self._marks) > 1 and self._clock.is_past(self._marks[1][1]):
            phase, start = self._marks.pop(0)
            if phase is not None:
                found[phase] += self._clock.seconds(start, self._marks[0][1])
        return found

    def forget(self) -> None:
        """Count no time since the last reading: that of a step that has failed, and until the next mark."""
        self._end_range()
        self._marks.clear()

    @contextmanager
    def recording(self) -> Iterator[list[Mark]]:
        """Record the marks of a `with` statement's body: the list has each, with its detail and the device's time."""
        recorded: list[Mark] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def _take(self, phase: Phase | None, detail: object = "") -> None:
        time = self._clock.now()
        self._marks.append((phase, time))
        if self._recorded is not None:
            self._recorded.append((phase, detail, time))

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
