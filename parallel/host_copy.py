"""Results on their way from the device to the host."""

import torch
from torch import Tensor


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
