"""Point-to-point messages between pipeline stages.

What a stage receives and what it sends, forward and backward, are in four process groups, so that none of them waits
behind another. Within one, messages between two ranks match in the order in which each end posts them. gloo carries no
CUDA tensors from rank to rank: there they go through the host.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh.collectives import Pending
from parallel.mesh.mesh import Axis


@dataclass(frozen=True)
class Pipe:
    """The pipe axis four times over, each in a process group of its own: for activations and for gradients, from even
    stages and from odd ones. NCCL does what it is given in a group in turn: a receive would keep back what has to be
    sent.
    """

    links: tuple[Axis, ...]

    @property
    def rank(self) -> int:
        return self.links[0].rank

    @property
    def size(self) -> int:
        return self.links[0].size

    def link(self, source: int, to: int) -> Axis:
        """That of the messages of a stage to its neighbour."""
        return self.links[2 * (to < source) + source % 2]

    def connect(self, device: torch.device) -> None:
        """Send a number down the pipe and another back up. Every rank calls this, before a plan runs.

        NCCL connects two ranks when they first meet, and until then keeps the host waiting, perhaps for what this rank
        has yet to post.
        """
        number = torch.zeros(1, device="cpu" if _goes_by_host(self.links[0]) else device)
        for step in (1, -1):
            before, after = self.rank - step, self.rank + step
            if 0 <= before < self.size:
                axis = self.link(before, self.rank)
                dist.recv(number, axis.ranks[before], axis.group)
            if 0 <= after < self.size:
                axis = self.link(self.rank, after)
                dist.send(number, axis.ranks[after], axis.group)


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
