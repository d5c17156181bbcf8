"""An update that device and host do together: the bus is what limits the device, and the host does without it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from parallel.phases import clock_of
from parallel.streaming import Part, Stream, Update, in_parts
from parallel.transfer import Placement, Tier

HOST_PART = 2**20  # elements: what one pass over them leaves in the caches, the next finds there
FIRST_SHARE = 0.25  # of the elements are the host's, until both sides have been timed


class SharedUpdate:
    """Streams parts through the device, but leaves the last, `share` of all elements, to the host where they are.

    The two round differently. So the share stays what it is until somebody sets it: to `balance()`, best.
    """

    def __init__(self, device: torch.device) -> None:
        self.share = FIRST_SHARE
        self._clock = clock_of(device)
        self._stream = Stream(device)
        self._thread = ThreadPoolExecutor(1, "update")
        self._rates: Callable[[], tuple[float, float]] = lambda: (1.0, 0.0)

    def run(self, wholes: Sequence[Part], on_device: Update, on_host: Update) -> None:
        """Each one's home as one or the other update leaves the parts of it that are given to it."""
        streamed, left = self._split(in_parts(wholes))
        begun = self._clock.now()
        host = self._thread.submit(_update_in_place, left, on_host)
        if streamed:
            self._stream.run(streamed, on_device)
        ended = self._clock.now()
        seconds = host.result()
        self._rates = lambda: (
            _elements(streamed) / (self._clock.seconds(begun, ended) or 1e-9),
            _elements(left) / (seconds or 1e-9),
        )

    def balance(self) -> float:
        """The share with which both sides would have needed as long, each as fast as in the last run, which the device
        must have done.
        """
        device, host = self._rates()
        return host / (device + host) if host else self.share

    def _split(self, parts: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
        first, room = len(parts), self.share * _elements(parts)
        while first and _is_on_host(parts[first - 1]) and (room := room - len(parts[first - 1].gradient)) >= 0:
            first -= 1
        return parts[:first], parts[first:]


def _update_in_place(parts: Sequence[Part], update: Update) -> float:
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
    return part.chunk.placement == Placement(Tier.HOST, Tier.HOST)


def _elements(parts: Sequence[Part]) -> int:
    return sum(len(part.gradient) for part in parts)
