"""The times at which a rank computed the actions of its plan, on one clock for all ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from parallel.engine.phases import Stopwatch
from parallel.mesh.clocks import ClockOffset
from parallel.ops.clock import clock_of
from parallel.plan.plan import Action
from parallel.plan.timeline import Span


@contextmanager
def timed_actions(stopwatch: Stopwatch, device: torch.device, offset: ClockOffset) -> Iterator[list[Span]]:
    """Record the computes of a `with` statement's body, from the marks of the engine's stopwatch.

    At its end, which waits for the device, the list has them in order, in seconds since the clocks were compared. An
    action lasts from its mark to the next mark, of whatever phase.

    On a GPU these are events in its stream, so that an action is as long as the GPU computes it, however far the host
    is ahead; one reading of both clocks relates the two, with an error of some 20 µs.
    """
    clock = clock_of(device)
    start = clock.now()
    _synchronize(device)
    zero = time.perf_counter() - offset.seconds - offset.origin
    spans: list[Span] = []
    with stopwatch.recording() as marks:
        yield spans
        _synchronize(device)
    for (phase, detail, begin), (_, _, end) in pairwise(marks):
        if phase in ("forward", "backward") and isinstance(detail, Action):
            spans.append(Span(detail, zero + clock.seconds(start, begin), zero + clock.seconds(start, end)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
