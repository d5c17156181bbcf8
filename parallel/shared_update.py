"""An update that device and host do together: the bus is what limits the device, and the host does without it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from parallel.phases import clock_of
from parallel.streaming import Part, Stream, Update, in_parts
from parallel.transfer import Placement, Tier

HOST_PART = 2**20  # elements: what one pass over them leaves in the caches, the next finds there
FIRST_SHARE = 0.25  # of the elements are the host's, until both sides have been timed


@dataclass(frozen=True)
class Side:
    """What one of the two did in a run."""

    elements: float
    seconds: float

    @property
    def rate(self) -> float:
        """Elements a second; 0 where it did none."""
        return self.elements / (self.seconds or 1e-9)

    def at(self, rate: float) -> float:
        """The seconds that it would have needed."""
        return self.elements / rate if rate else 0.0


class SharedUpdate:
    """Streams parts through the device, but leaves the last, `share` of all elements, to the host where they are.

    The two round differently. So the share stays what it is until somebody sets it: to `balance()`, best, the same on
    all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.share = FIRST_SHARE
        self._clock = clock_of(device)
        self._stream = Stream(device)
        self._thread = ThreadPoolExecutor(1, "update")
        self._last: Callable[[], tuple[Side, Side]] = lambda: (Side(0, 0.0), Side(0, 0.0))

    def run(self, wholes: Sequence[Part], on_device: Update, on_host: Update) -> None:
        """Each one's home as one or the other update leaves the parts of it that are given to it."""
        streamed, left = self._split(in_parts(wholes))
        begun = self._clock.now()
        host = self._thread.submit(update_in_place, left, on_host)
        if streamed:
            self._stream.run(streamed, on_device)
        ended = self._clock.now()
        seconds, counts = host.result(), (_elements(streamed), _elements(left))  # and nothing holds a part any more
        self._last = lambda: (Side(counts[0], self._clock.seconds(begun, ended)), Side(counts[1], seconds))

    def balance(self) -> float:
        """The share, to a sixteenth, with which both sides would have needed as long, each as fast as in the last run,
        which the device must have done.
        """
        device, host = (side.rate for side in self._last())
        return round(16 * host / (device + host)) / 16 if host else self.share

    def gain(self, share: float) -> float:
        """The seconds that this share would have spared the last run, which the device must have done."""
        device, host = self._last()
        count = device.elements + host.elements
        took = max(device.seconds, host.seconds)
        return took - max(Side(count * (1 - share), 0.0).at(device.rate), Side(count * share, 0.0).at(host.rate))

    def _split(self, parts: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
        streamed, left = [], list[Part]()
        room = self.share * _elements(parts)
        for part in reversed(parts):
            if _is_on_host(part) and len(part.gradient) <= room:
                left.append(part)
                room -= len(part.gradient)
            else:
                streamed.append(part)
        return streamed[::-1], left[::-1]


def update_in_place(parts: Sequence[Part], update: Update) -> float:
    """The seconds that it took, from when all gradients were there."""
    for part in parts:
        part.chunk.gradient_written.synchronize()
    begun = time.perf_counter()
    for part in parts:
        for piece in part.split(HOST_PART):
            update(piece)
            if piece.own is not None:
                piece.own.copy_(piece.states[0])
    return time.perf_counter() - begun


def _is_on_host(part: Part) -> bool:
    """And may be updated there. Of a tied weight another pipeline stage has the same masters among other parts: both
    leave it to the device.
    """
    return part.chunk.placement == Placement(Tier.HOST, Tier.HOST) and len(part.chunk.axes) == 1


def _elements(parts: Sequence[Part]) -> int:
    return sum(len(part.gradient) for part in parts)
