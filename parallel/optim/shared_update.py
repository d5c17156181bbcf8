"""An update that device and host do together: the bus is what limits the device, and the host does without it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch

from parallel.ops.clock import clock_of
from parallel.optim.part import Part
from parallel.optim.streaming import Stream, Update, in_parts
from parallel.storage.transfer import Placement, Tier

HOST_PART = 2**20  # elements: what one pass over them leaves in the caches, the next finds there
FIRST_SHARE = 0.25  # is the host's, until all sides have been timed


@dataclass(frozen=True)
class Side:
    """What one of those that work on an update did in it."""

    elements: float
    seconds: float

    def at(self, elements: float) -> float:
        """The seconds that it would have needed for so many; 0 where it is not known."""
        return elements * self.seconds / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Run:
    """An update: the device's part of it, first what came from a disk and then what came from the host, and the host's.
    Of the elements of the latter two `movable` might have been either's.
    """

    disk: Side
    bus: Side
    host: Side
    movable: float

    def best(self) -> float | None:
        """The share of what is movable with which neither side would have waited for the other; None if the host, or
        the device, did nothing.
        """
        if not self.host.elements or not self.disk.elements + self.bus.elements:
            return None
        both = self.bus.elements + self.host.elements
        own = (self.disk.seconds + self.bus.at(both)) / (self.bus.at(1) + self.host.at(1) or 1e-12)
        return min(1.0, own / self.movable)

    def seconds(self, share: float) -> float:
        """As it would have been with this share."""
        own = share * self.movable
        both = self.bus.elements + self.host.elements
        return max(self.disk.seconds + self.bus.at(both - own), self.host.at(own))

    @property
    def took(self) -> float:
        return max(self.disk.seconds + self.bus.seconds, self.host.seconds)


NOTHING = Run(Side(0, 0.0), Side(0, 0.0), Side(0, 0.0), 0)


class SharedUpdate:
    """Streams parts through the device, but leaves the last to the host where they are: `share` of the elements whose
    states are at home there.

    The two round differently. So the share stays what it is until somebody sets it: to `balance()`, best, the same on
    all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.share = FIRST_SHARE
        self._clock = clock_of(device)
        self._stream = Stream(device)
        self._thread = ThreadPoolExecutor(1, "update")
        self._last: Callable[[], Run] = lambda: NOTHING

    def run(self, wholes: Sequence[Part], on_device: Update, on_host: Update) -> None:
        """Each one's home as one or the other update leaves the parts of it that are given to it."""
        parts = in_parts(wholes)
        from_disk = [part for part in parts if part.is_on_disk]
        from_host, left = self._split([part for part in parts if not part.is_on_disk])
        moments = [self._clock.now()]
        host = self._thread.submit(update_in_place, left, on_host)
        for streamed in (from_disk, from_host):
            if streamed:
                self._stream.run(streamed, on_device)
            moments.append(self._clock.now())
        seconds, counts = host.result(), [_elements(x) for x in (from_disk, from_host, left)]
        movable = _elements([part for part in parts if _is_movable(part)])

        def last() -> Run:  # of numbers alone: it holds no part
            disk, bus = (self._clock.seconds(begun, ended) for begun, ended in pairwise(moments))
            return Run(Side(counts[0], disk), Side(counts[1], bus), Side(counts[2], seconds), movable)

        self._last = last

    def balance(self) -> float:
        """The best share for the last run, which the device must have done, to a sixteenth."""
        best = self._last().best()
        return self.share if best is None else round(16 * best) / 16

    def gain(self, share: float) -> float:
        """The seconds that this share would have spared the last run, which the device must have done."""
        last = self._last()
        return last.took - last.seconds(share)

    def _split(self, parts: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
        streamed, left = [], list[Part]()
        room = self.share * _elements([part for part in parts if _is_movable(part)])
        for part in reversed(parts):
            if _is_movable(part) and len(part.gradient) <= room:
                left.append(part)
                room -= len(part.gradient)
            else:
                streamed.append(part)
        return streamed[::-1], left[::-1]


def update_in_place(parts: Sequence[Part], update: Update) -> float:
    """The seconds that it took, from when all gradients were there."""
    for part in parts:
        part.arrived.synchronize()
    begun = time.perf_counter()
    for part in parts:
        for piece in part.split(HOST_PART):
            update(piece)
            if piece.own is not None:
                piece.own.copy_(piece.states[0])
    return time.perf_counter() - begun


def _is_movable(part: Part) -> bool:
    """At home on the host, it may be updated there. Of a tied weight another pipeline stage has the same masters among
    other parts: both leave it to the device.
    """
    return part.chunk.placement == Placement(Tier.HOST, Tier.HOST) and len(part.chunk.spec.axes) == 1


def _elements(parts: Sequence[Part]) -> int:
    return sum(len(part.gradient) for part in parts)
