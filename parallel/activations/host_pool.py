"""A pool of buffers on the host, which are pinned where the device is a GPU."""

import torch
from torch import Tensor

from parallel.storage.transfer import copies_of, host_empty


class HostPool:
    """Buffers of bytes on the host, never more than were in use at the same time. `nbytes` counts all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies, self.nbytes = device, copies_of(device), 0
        self._free: dict[int, Tensor] = {}

    def acquire(self, size: int) -> Tensor:
        """Return the smallest free buffer of at least `size` bytes; if there is none, a new one, in place of the
        largest that is free.
        """
        free = sorted(self._free.values(), key=len)
        fitting = next((buffer for buffer in free if len(buffer) >= size), None)
        if fitting is not None:
            return self._free.pop(id(fitting))
        if free:
            self.copies.synchronize()  # a copy may still be going to read it
            self.nbytes -= self._free.pop(id(free[-1])).nbytes
        buffer = host_empty(size, torch.uint8, self.device)
        self.nbytes += size
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Free a buffer. Copies of it may still be in flight: those of its next user are queued behind them."""
        self._free[id(buffer)] = buffer
