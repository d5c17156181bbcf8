"""The times at which a rank computed the actions of its plan, on one clock for all ranks."""

import time
from itertools import pairwise

import torch

from parallel.engine.phases import Stopwatch
from parallel.mesh.clocks import ClockOffset
from parallel.ops.clock import clock_of
from parallel.pipeline.plan import Action
from parallel.pipeline.timeline import Span


class ActionTimes:
    """Records actions from now until `end`, from the marks of the engine's stopwatch.

    On a GPU these are events in its stream, so that an action is as long as the GPU computes it, however far the host
    is ahead; one reading of both clocks relates the two, with an error of some 20 µs.
    """

    def __init__(self, stopwatch: Stopwatch, device: torch.device, offset: ClockOffset) -> None:
        self.stopwatch, self.device, self.offset = stopwatch, device, offset
        self._clock = clock_of(device)
        self._start = self._clock.now()
        self._synchronize()
        self._host_start = time.perf_counter()
        stopwatch.record = []

    def end(self) -> list[Span]:
        """Stop to record, and return the computes in order, in seconds since the clocks were compared.

        An action lasts from its mark to the next mark, of whatever phase. This waits for the device.
        """
        self._synchronize()
        marks, self.stopwatch.record = self.stopwatch.record or [], None
        zero = self._host_start - self.offset.seconds - self.offset.origin
        return [
            Span(detail, zero + self._clock.seconds(self._start, begin), zero + self._clock.seconds(self._start, end))
            for (phase, detail, begin), (_, _, end) in pairwise(marks)
            if phase in ("forward", "backward") and isinstance(detail, Action)
        ]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
