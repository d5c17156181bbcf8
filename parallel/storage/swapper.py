"""The parts of an update whose states are on a disk: read ahead of the update, written behind it.

The counterpart in DeepSpeed's ZeRO-Infinity is `PipelinedOptimizerSwapper`.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from parallel.storage.state_file import StateFiles, in_pages
from parallel.storage.transfer import CopyEvent, host_empty

NUM_SLOTS = 6  # parts that are being read, updated or written at the same time
NUM_THREADS = 3  # for reading, and as many for writing: a part has three states

States: TypeAlias = tuple[Tensor, Tensor, Tensor]


class _Slot:
    """Memory on the host for the states of one part, and the reads and writes that use it."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []  # uint8 [whole pages], one for each state
        self.reads: list[Future[None]] = []
        self.writes: list[Future[None]] = []

    def wait(self) -> None:
        for job in (*self.reads, *self.writes):
            job.result()


class PartSwapper:
    """Slots on the host through which the parts of an update pass, in a ring.

    `begin` says which parts an update needs, in which order. `fetch` returns the next one, which is in a slot by then,
    and `store` writes it back from there once the device is done with it. Parts are read ahead, as many as there are
    free slots, and written behind, each in threads of its own. `end` starts to read the first parts of the next update:
    writes continue meanwhile, and a slot is not read into before what it holds is written.
    """

    def __init__(self, files: StateFiles, device: torch.device) -> None:
        self.files, self.device = files, device
        self._slots = [_Slot() for _ in range(NUM_SLOTS)]
        self._parts: list[States] = []
        self._num_requested = self._num_fetched = self._num_stored = 0  # parts of this update, in this order
        self._readers = ThreadPoolExecutor(NUM_THREADS, "read states")
        self._writers = ThreadPoolExecutor(NUM_THREADS, "write states")

    @property
    def buffer_bytes(self) -> int:
        return sum(len(buffer) for slot in self._slots for buffer in slot.buffers)

    def has(self, parts: Sequence[States]) -> bool:
        """Return whether the last update had the same parts: then the first of them have been read, or are being."""
        return len(parts) == len(self._parts) and all(map(_are_the_same, parts, self._parts))

    def begin(self, parts: Sequence[States]) -> None:
        """Begin an update of these parts, in this order. Each begins at a whole page of its files."""
        self._parts = list(parts)
        for k, states in enumerate(zip(*self._parts, strict=True)):
            self._make_buffers(k, max(in_pages(x.nbytes) for x in states))

    def fetch(self) -> States:
        """Return the states of the next part, in a slot. The part before it is still being updated, or stored."""
        self._request(until=self._num_fetched + NUM_SLOTS - 1)
        slot, like = self._slots[self._num_fetched % NUM_SLOTS], self._parts[self._num_fetched]
        for job in slot.reads:
            job.result()
        self._num_fetched += 1
        first, second, third = (buffer[: x.nbytes].view(x.dtype) for buffer, x in zip(slot.buffers, like, strict=True))
        return first, second, third

    def store(self, updated: CopyEvent) -> None:
        """Write back the part that was fetched longest ago, once the copy of it to its slot has ended: `updated`."""
        slot, part = self._slots[self._num_stored % NUM_SLOTS], self._parts[self._num_stored]
        slot.writes = [
            self._writers.submit(self._write, x, buffer, updated) for x, buffer in zip(part, slot.buffers, strict=True)
        ]
        self._num_stored += 1

    def end(self) -> None:
        """End an update, all of whose parts are stored."""
        self._num_requested = self._num_fetched = self._num_stored = 0
        self._request(until=NUM_SLOTS - 1)

    def wait(self) -> None:
        """Wait for all reads and writes."""
        for slot in self._slots:
            slot.wait()

    def stop(self) -> None:
        """Wait for all reads and writes, and drop the parts, which will be read again."""
        self.wait()
        self._num_requested = self._num_fetched = self._num_stored = 0
        self._parts = []

    def free_buffers(self) -> None:
        for slot in self._slots:
            slot.buffers = []

    def _request(self, until: int) -> None:
        """Start to read the parts before `until` for which that has not been done."""
        for i in range(self._num_requested, min(until, len(self._parts))):
            slot = self._slots[i % NUM_SLOTS]
            written = slot.writes
            slot.reads = [
                self._readers.submit(self._read, x, buffer, written)
                for x, buffer in zip(self._parts[i], slot.buffers, strict=True)
            ]
            self._num_requested = i + 1

    def _read(self, x: Tensor, buffer: Tensor, written: Sequence[Future[None]]) -> None:
        for job in written:
            job.result()
        file, start, stop = self.files.location_of(x)
        file.read_at(start, buffer[: stop - start])

    def _write(self, x: Tensor, buffer: Tensor, updated: CopyEvent) -> None:
        updated.synchronize()
        file, start, stop = self.files.location_of(x)
        file.write_at(start, buffer[: stop - start])

    def _make_buffers(self, k: int, num_bytes: int) -> None:
        """Give every slot a buffer of this size for the `k`th state of a part."""
        for slot in self._slots:
            if len(slot.buffers) <= k or len(slot.buffers[k]) < num_bytes:
                slot.wait()
                slot.buffers[k : k + 1] = [host_empty(num_bytes, torch.uint8, self.device, in_pages=True)]


def _are_the_same(a: States, b: States) -> bool:
    return [(x.data_ptr(), x.nbytes, x.dtype) for x in a] == [(x.data_ptr(), x.nbytes, x.dtype) for x in b]
