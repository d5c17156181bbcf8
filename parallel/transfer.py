"""Between the host and a device, without either waiting for the other."""

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


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x there, for work posted from now on. From memory that is not pinned a GPU would let the host wait its turn."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
