"""Between the host and a device, without either waiting for the other."""

import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, cached_property

import torch
from torch import Tensor


class Tier(Enum):
    """Where memory is."""

    DEVICE = auto()
    HOST = auto()
    DISK = auto()


@dataclass(frozen=True)
class Placement:
    """Where a chunk is at home: its parameters between their uses, on the device or the host, and its states: masters,
    moments, and a gradient once it has been summed, which stays on the host where the others are on a disk.
    """

    parameters: Tier = Tier.DEVICE
    states: Tier = Tier.DEVICE


ON_DEVICE = Placement()


class HostCopy:
    """A copy of x on the host, asked for now and waited for later: by then the device may be busy with other work."""

    def __init__(self, x: Tensor) -> None:
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        self._arrival: torch.cuda.Event | None = None
        if x.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def wait(self) -> Tensor:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x there, for work posted from now on. From memory that is not pinned a GPU would let the host wait its turn."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def host_empty(size: int, dtype: torch.dtype, device: torch.device, *, in_pages: bool = False) -> Tensor:
    """[size] on the host, from where copies to `device` are asynchronous; `in_pages`: it begins at a page.

    Registered with the driver as it is, because torch's own pinned memory comes in powers of two; in huge pages, of
    which there are fewer to pin. Raises MemoryError where the driver refuses.
    """
    if not size or (device.type != "cuda" and not in_pages):
        return torch.empty(size, dtype=dtype)
    pages = mmap.mmap(-1, size * dtype.itemsize)
    pages.madvise(mmap.MADV_HUGEPAGE)
    x = torch.frombuffer(pages, dtype=dtype)
    if device.type != "cuda":
        return x
    runtime, address = torch.cuda.cudart(), x.data_ptr()
    problem = runtime.cudaHostRegister(address, x.nbytes, 0)
    if int(problem):
        raise MemoryError(f"the driver refuses to pin {x.nbytes} bytes on the host: error {int(problem)}.")
    weakref.finalize(x, runtime.cudaHostUnregister, address)
    return x


class Copies:
    """Copies up to a device and down from it, in two queues beside its computation; on a CPU they are done at once.

    A copy waits for all that the device's current stream has been given by then, and for what the same queue was asked
    for before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        return torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def upload(self, source: Tensor, out: Tensor, *, after: "CopyEvent | None" = None) -> "CopyEvent":
        """From the host, `after` a copy that writes the source. `out` must not be freed before the arrival."""
        return self._copy(0, source, out, after)

    def download(self, source: Tensor, out: Tensor) -> "CopyEvent":
        """To the host. The source may be freed at once."""
        if source.is_cuda:
            source.record_stream(self._streams[1])
        return self._copy(1, source, out, None)

    @contextmanager
    def on_upload_stream(self) -> Iterator[None]:
        """A block in which the device is given work for what has come up, and its computation does not wait for it."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(self._streams[0]):
            yield

    def synchronize(self) -> None:
        """Wait, on the host, for all that was asked for."""
        if self.device.type == "cuda":
            for stream in self._streams:
                stream.synchronize()

    def _copy(self, queue: int, source: Tensor, out: Tensor, after: "CopyEvent | None") -> "CopyEvent":
        if self.device.type != "cuda":
            out.copy_(source)
            return CopyEvent()
        stream = self._streams[queue]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if after is not None:
                after.wait()
            out.copy_(source, non_blocking=True)
        return CopyEvent(stream.record_event())


@cache
def copies_of(device: torch.device) -> Copies:
    """The queues of this device: one pair for all that is copied."""
    return Copies(device)


class CopyEvent:
    """The end of a copy: work that the current stream is given after `wait` finds it done."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        """Wait for it on the host."""
        if self._event is not None:
            self._event.synchronize()
