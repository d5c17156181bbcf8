"""Tiers of memory, and asynchronous copies between the host and a device, for which neither waits."""

import mmap
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor


class Tier(Enum):
    """A kind of memory."""

    DEVICE = auto()
    HOST = auto()
    DISK = auto()


@dataclass(frozen=True)
class Placement:
    """The tiers of a chunk: of its parameters while they are not used, and of its optimizer states.

    parameters   the device, or the host: then they are gathered on demand
    states       master weights, moments, and the gradient once it is summed over ranks; but the gradient is on the host
                 if the states are on a disk
    """

    parameters: Tier = Tier.DEVICE
    states: Tier = Tier.DEVICE


ON_DEVICE = Placement()


class HostCopy:
    """A copy of x on the host in pinned memory, started now and waited for later.

    `wait` does not wait for work that the device is given after the copy.
    """

    def __init__(self, x: Tensor) -> None:
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if x.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return x on the device, for work that is launched from now on.

    It is pinned first: a copy from memory that is not pinned would let the host wait until the GPU comes to it.
    """
    if device.type != "cuda" or x.is_cuda or x.layout != torch.strided or x.is_nested:
        return x.to(device)
    return _dense(x).pin_memory().to(device, non_blocking=True)


def _dense(x: Tensor) -> Tensor:
    """Return x, or a copy of it, with no element in the memory of another one, as in an expanded tensor, and no gap
    between two, as in every second column: pinned memory has the strides of what is copied into it.
    """
    is_dense = x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()
    return x if is_dense else x.clone()


def host_empty(size: int, dtype: torch.dtype, device: torch.device, *, in_pages: bool = False) -> Tensor:
    """Return an uninitialized tensor [size] on the host, pinned so that copies to a GPU `device` are asynchronous.

    `in_pages`: it begins at a page. Ordinary memory is registered with the driver, because torch's own pinned memory
    comes in powers of two; and it has huge pages, since fewer of them have to be pinned. Raises MemoryError where the
    driver refuses.
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
    """Copies from the host to a device and back, in two streams beside its computation. On a CPU they are done at once.

    A copy waits for all work that the device's current stream has been given before it, and for the earlier copies in
    the same direction.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The stream of uploads, and that of downloads."""
        return torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def upload(self, source: Tensor, out: Tensor, *, after: "CopyEvent | None" = None) -> "CopyEvent":
        """Start a copy from the host, `after` a copy that writes the source. `out` must not be freed before it ends."""
        return self._copy(0, source, out, after)

    def download(self, source: Tensor, out: Tensor) -> "CopyEvent":
        """Start a copy to the host. The source may be freed at once."""
        if source.is_cuda:
            source.record_stream(self._streams[1])
        return self._copy(1, source, out, None)

    @contextmanager
    def on_upload_stream(self) -> Iterator[None]:
        """Launch the work of this block in the stream of uploads: it waits for them, and computation does not wait."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(self._streams[0]):
            yield

    def synchronize(self) -> None:
        """Wait, on the host, for all copies."""
        if self.device.type == "cuda":
            for stream in self._streams:
                stream.synchronize()

    def _copy(self, direction: int, source: Tensor, out: Tensor, after: "CopyEvent | None") -> "CopyEvent":
        if self.device.type != "cuda":
            if after is not None:
                after.synchronize()
            out.copy_(source)
            return CopyEvent()
        stream = self._streams[direction]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if after is not None:
                after.wait()
            out.copy_(source, non_blocking=True)
        return CopyEvent(stream.record_event())


@cache
def copies_of(device: torch.device) -> Copies:
    """Return the copies of this device: all of its users share one pair of streams."""
    return Copies(device)


class CopyEvent:
    """The end of a copy, if there is one. Work that the current stream is given after `wait` begins when it has ended.

    `on_host`: what a thread of the host writes, beside the copy or without one, for which the host itself waits.
    """

    def __init__(self, event: torch.cuda.Event | None = None, *, on_host: Future[Any] | None = None) -> None:
        self._event, self._on_host = event, on_host

    def wait(self) -> None:
        if self._on_host is not None:
            self._on_host.result()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        """Wait, on the host, for the end of the copy."""
        if self._on_host is not None:
            self._on_host.result()
        if self._event is not None:
            self._event.synchronize()


class LaterEvent(CopyEvent):
    """The end of a copy that may be launched only when somebody waits for it: `launch`, called before each wait, calls
    `launched` unless that has been done.
    """

    def __init__(self, launch: Callable[[], None], *, on_host: Future[Any] | None = None) -> None:
        super().__init__(on_host=on_host)
        self._launch = launch

    def launched(self, copied: CopyEvent) -> None:
        """Note the end of the copy, which has been launched."""
        self._event = copied._event

    def wait(self) -> None:
        self._launch()
        super().wait()

    def synchronize(self) -> None:
        self._launch()
        super().synchronize()
