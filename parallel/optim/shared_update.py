"""An update that the device and the host share: the bus limits the device, and the host does not need it."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.ops.clock import clock_of
from parallel.optim.launch_queue import LaunchQueue
from parallel.optim.part import Part
from parallel.optim.streaming import Stream, Update, in_parts
from parallel.storage.transfer import CopyEvent, Placement, Tier

HOST_PART = 2**20  # elements: few enough to stay in the caches from one pass over them to the next
FIRST_SHARE = 0.25  # of the host, until all sides have been timed


@dataclass(frozen=True)
class Side:
    """The elements that one of the sides of an update has updated, and the seconds that it took."""

    elements: float
    seconds: float

    def at(self, elements: float) -> float:
        """Return the seconds that this side would have needed for another number of elements; 0 if it is not known."""
        return elements * self.seconds / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class OffloadedElements:
    """The elements of an update whose states are on a disk, and those whose states are on the host. Of the latter,
    `movable` can be updated by either side.
    """

    disk: int
    host: int
    movable: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "OffloadedElements":
        """Return those of chunks, where they are now."""
        disk = sum(len(chunk.master) for chunk in chunks if chunk.placement.states is Tier.DISK)
        host = sum(len(chunk.master) for chunk in chunks if chunk.placement.states is Tier.HOST)
        movable = sum(len(chunk.master) for chunk in chunks if _is_movable(chunk))
        return cls(disk, host, movable)


@dataclass(frozen=True)
class UpdateTimes:
    """The times of one update. The device updates what comes from a disk (`disk`), then what comes over the bus from
    the host (`bus`); meanwhile the host updates its share (`host`).
    """

    disk: Side
    bus: Side
    host: Side

    def best(self, elements: OffloadedElements) -> float | None:
        """Return the share of the movable elements with which neither side would wait for the other in an update of
        these elements, at the speeds of this one; 1 if none is movable, and None if a speed is not known.
        """
        if not elements.movable:
            return 1.0
        if not self.bus.elements or not self.host.elements:
            return None
        own = self._on_device(elements) / (self.bus.at(1) + self.host.at(1) or 1e-12)
        return min(1.0, own / elements.movable)

    def seconds(self, share: float, elements: OffloadedElements) -> float:
        """Return the seconds that an update of these elements would take with this share on the host, at the speeds of
        this one.
        """
        own = share * elements.movable
        return max(self._on_device(elements) - self.bus.at(own), self.host.at(own))

    def _on_device(self, elements: OffloadedElements) -> float:
        """Return the seconds of the device if it updated all of these elements.

        What comes from a disk comes over the bus too: that is what is known of it if nothing came from there.
        """
        from_disk = self.disk if self.disk.elements else self.bus
        return from_disk.at(elements.disk) + self.bus.at(elements.host)

    @property
    def took(self) -> float:
        """The seconds that the update took."""
        return max(self.disk.seconds + self.bus.seconds, self.host.seconds)


NOTHING = UpdateTimes(Side(0, 0.0), Side(0, 0.0), Side(0, 0.0))


class SharedUpdate:
    """Streams parts through the device, and lets the host update the last ones where they are: `share` of the elements
    that either side may update. DeepSpeed's ZeRO-Offload updates all of these on the host (Ren et al. 2021, arXiv
    2101.06840).

    Device and host round differently. Therefore the share only changes when it is set, to the same value on all ranks:
    `balance()` is the best one.

    Nobody waits for the whole of it: the device has a stream for it beside that of computation, and the host a thread.
    A layer waits for its own update when it is used (`Chunk.waits_when_used`). So the next forward begins while later
    layers are updated. Other chunks come first: those of the root, which a forward begins with, and those whose
    parameters are on the device where somebody may read them at any time. For these, computation waits in
    `wait_for_parameters_on_device`.
    """

    def __init__(self, device: torch.device) -> None:
        self.share = FIRST_SHARE
        self._device, self._clock = device, clock_of(device)
        self._stream = Stream(device)
        # The stream of updates. Its short kernels come before those of computation: each keeps the bus waiting.
        self._beside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "update")
        self._queue = LaunchQueue(iter(()), [], {}, within=self._in_stream)
        self._updated = CopyEvent()  # the last part whose parameters are on the device
        self._last: Callable[[], UpdateTimes] = lambda: NOTHING

    def run(
        self, wholes: Sequence[Part], on_device: Update, on_host: Update, *, numbers: Sequence[Tensor] = ()
    ) -> None:
        """Begin the update of all parts, some with `on_device` and the others with `on_host`; the results are written
        back. `numbers` are tensors on the device that `on_device` reads.

        The parts are launched that a forward needs first, and all that the host updates; the others follow as somebody
        waits for their chunks: see `LaunchQueue`.
        """
        parts = in_parts(sorted(wholes, key=lambda part: part.chunk.waits_when_used))
        from_disk = [part for part in parts if part.is_on_disk]
        from_host, left = self._split([part for part in parts if not part.is_on_disk])
        on_hosts = self._launch_on_host(left, on_host)
        for chunk, written in on_hosts.items():
            chunk.parameters.record_write(CopyEvent(on_host=written))
        streamed = [*from_disk, *from_host]
        self._wait_for_computation([*numbers, *(x.own for x in wholes if x.own is not None and x.own_is_on_device)])
        times = list[Any]()
        launches = self._launches(from_disk, from_host, on_device, times)
        self._queue = queue = LaunchQueue(launches, streamed, on_hosts, within=self._in_stream)
        queue.launch(len(from_disk) + sum(not part.chunk.waits_when_used for part in from_host))
        self._updated = self._end_of_parameters_on_device(streamed)
        counts = [_elements(x) for x in (from_disk, from_host, left)]
        threads = list(on_hosts.values())

        def last() -> UpdateTimes:  # it refers to numbers alone: a part would keep its memory
            queue.launch_all()
            if self._beside is not None:
                self._beside.synchronize()  # the device has reached the times
            disk, bus = (self._clock.seconds(begun, ended) for begun, ended in pairwise(times))
            seconds = sum(thread.result() for thread in threads)
            return UpdateTimes(Side(counts[0], disk), Side(counts[1], bus), Side(counts[2], seconds))

        self._last = last

    def wait_for_parameters_on_device(self) -> None:
        """Let computation wait for the update of parameters that stay on the device."""
        self._updated.wait()

    def finish(self) -> None:
        """Launch what is left, wait for the thread, and let computation wait for the stream of updates: another update
        may begin.
        """
        self._queue.launch_all()
        self._thread.submit(lambda: None).result()
        if self._beside is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._beside)

    def _launch_on_host(self, parts: Sequence[Part], update: Update) -> dict[Chunk, Future[float]]:
        """Start to update parts on the host, chunk by chunk."""
        of_chunks: dict[Chunk, list[Part]] = {}
        for part in parts:
            of_chunks.setdefault(part.chunk, []).append(part)
        return {chunk: self._thread.submit(update_in_place, of_chunk, update) for chunk, of_chunk in of_chunks.items()}

    def _launches(
        self, from_disk: Sequence[Part], from_host: Sequence[Part], update: Update, times: list[Any]
    ) -> Iterator[CopyEvent]:
        """Launch a part with each item, and note the times before, between and after the parts of both kinds."""
        times.append(self._clock.now())
        for parts in (from_disk, from_host):
            if parts:
                yield from self._stream.run(parts, update)
            times.append(self._clock.now())

    def _wait_for_computation(self, used: Sequence[Tensor]) -> None:
        """Let the stream of updates wait for what computation has been given so far, and for nothing that it is given
        later, when most parts are launched. `used` are tensors on the device that it reads or writes.
        """
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self._device))
            for x in used:
                x.record_stream(self._beside)

    @contextmanager
    def _in_stream(self) -> Iterator[None]:
        """Launch the work of this block in the stream of updates."""
        if self._beside is None:
            yield
            return
        with torch.cuda.stream(self._beside):
            yield

    def _end_of_parameters_on_device(self, parts: Sequence[Part]) -> CopyEvent:
        """Return the end of the update of parameters on the device for which nobody waits when they are used."""
        at_once = [part.chunk for part in parts if part.own_is_on_device and not part.chunk.waits_when_used]
        written = [chunk.parameters.written for chunk in at_once]
        return written[-1] if written else CopyEvent()

    def balance(self, chunks: Sequence[Chunk]) -> float:
        """Wait for the last update, and return the best share for chunks where they are now, in sixteenths."""
        best = self._last().best(OffloadedElements.of(chunks))
        return self.share if best is None else round(16 * best) / 16

    def seconds(self, chunks: Sequence[Chunk]) -> tuple[float, float]:
        """Wait for the last update. Return the seconds that it took, and those that an update of chunks takes where
        they are now.
        """
        last = self._last()
        return last.took, last.seconds(self.share, OffloadedElements.of(chunks))

    def _split(self, parts: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
        """Divide parts into those that stream through the device and the last ones, which are left to the host."""
        streamed, left = [], list[Part]()
        room = self.share * _elements([part for part in parts if _is_movable(part.chunk)])
        for part in reversed(parts):
            if _is_movable(part.chunk):
                room -= len(part.gradient)  # once there is none, no earlier part is left to the host: it is needed soon
            if _is_movable(part.chunk) and room >= 0:
                left.append(part)
            else:
                streamed.append(part)
        return streamed[::-1], left[::-1]


def update_in_place(parts: Sequence[Part], update: Update) -> float:
    """Update parts where they are, on the host. Return the seconds that it took after all gradients had arrived."""
    for part in parts:
        part.gradient_written.synchronize()
    begun = time.perf_counter()
    for part in parts:
        for smaller in part.split(HOST_PART):
            update([smaller])
    return time.perf_counter() - begun


def _is_movable(chunk: Chunk) -> bool:
    """Return True if either side may update a chunk: parameters and states are on the host, and no other pipeline stage
    has the same master weights. The parts of a tied weight differ between stages, so both update it on the device.
    """
    return chunk.placement == Placement(Tier.HOST, Tier.HOST) and len(chunk.spec.axes) == 1


def _elements(parts: Sequence[Part]) -> int:
    return sum(len(part.gradient) for part in parts)
