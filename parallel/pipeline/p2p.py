"""Point-to-point messages between pipeline stages.

Forward-going and backward-going messages have a process group each, so that neither waits behind the other. Within
one, messages between two ranks match in the order in which each end posts them. gloo carries no CUDA tensors from rank
to rank: there they go through the host.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Pending
from parallel.mesh import Axis


@dataclass(frozen=True)
class Pipe:
    """The pipe axis twice over: for activations, and for gradients."""

    forward: Axis
    backward: Axis

    @property
    def rank(self) -> int:
        return self.forward.rank

    @property
    def size(self) -> int:
        return self.forward.size

    def connect(self, device: torch.device) -> None:
        """Send a number down the pipe and another back up. Every rank calls this, before a plan runs.

        NCCL connects two ranks when they first meet, and until then keeps the host waiting: a receive that a plan posts
        ahead would wait for what this rank has yet to post.
        """
        for axis, step in ((self.forward, 1), (self.backward, -1)):
            number = torch.zeros(1, device="cpu" if _goes_by_host(axis) else device)
            if 0 <= axis.rank - step < axis.size:
                dist.recv(number, axis.ranks[axis.rank - step], axis.group)
            if 0 <= axis.rank + step < axis.size:
                dist.send(number, axis.ranks[axis.rank + step], axis.group)


def start_send(x: Tensor, axis: Axis, to: int) -> Pending:
    """Post x to the rank at coordinate `to`. It may be changed once this has been waited for."""
    x = x.contiguous().cpu() if _goes_by_host(axis) else x.contiguous()
    axis.traffic.count("send", x)
    return Pending(x, dist.isend(x, axis.ranks[to], axis.group))


def start_receive(shape: tuple[int, ...], like: Tensor, axis: Axis, source: int) -> Pending:
    """Post a place for a tensor of this shape, and of the dtype and device of `like`, from coordinate `source`."""
    device = torch.device("cpu") if _goes_by_host(axis) else like.device
    buffer = torch.empty(shape, dtype=like.dtype, device=device)
    return Pending(buffer, dist.irecv(buffer, axis.ranks[source], axis.group), lambda x: x.to(like.device))


def _goes_by_host(axis: Axis) -> bool:
    return axis.group is not None and "nccl" not in dist.get_backend(axis.group)
