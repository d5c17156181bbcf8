"""Point-to-point messages between pipeline stages.

A stage receives and sends, forward and backward, in four process groups, so that none of these waits behind another.
Within a group, messages between two ranks match in the order in which each end posts them. gloo sends no CUDA tensors
from rank to rank: these are copied to the host and back.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh.collectives import Pending, Watching, Works, announce, expect
from parallel.mesh.comparison import described
from parallel.mesh.mesh import Axis


@dataclass(frozen=True)
class Pipe:
    """The pipe axis four times, each in a process group of its own.

    There is one for activations and one for gradients, from stages of even and of odd number. NCCL executes the calls
    of a group in order: in a shared group a receive would delay what has to be sent.
    """

    links: tuple[Axis, ...]

    @property
    def rank(self) -> int:
        """The number of this rank's stage."""
        return self.links[0].rank

    @property
    def size(self) -> int:
        """The number of stages."""
        return self.links[0].size

    def link(self, source: int, to: int) -> Axis:
        """Return the axis for messages from stage `source` to its neighbour `to`."""
        return self.links[2 * (to < source) + source % 2]

    def connect(self, device: torch.device) -> None:
        """Send a number forward through the pipe and another back. Every rank calls this before a plan runs.

        NCCL connects two ranks at their first message, and blocks the host until both have called: in a plan that might
        be for a message that this rank has yet to post.
        """
        number = torch.zeros(1, device="cpu" if _sends_by_host(self.links[0]) else device)
        for step in (1, -1):
            before, after = self.rank - step, self.rank + step
            if 0 <= before < self.size:
                axis = self.link(before, self.rank)
                with Watching(axis.watch):
                    dist.recv(number, axis.ranks[before], axis.group)
            if 0 <= after < self.size:
                axis = self.link(self.rank, after)
                with Watching(axis.watch):
                    dist.send(number, axis.ranks[after], axis.group)


def start_send(x: Tensor, axis: Axis, to: int) -> Pending:
    """Start to send x to the rank at coordinate `to`. x must not be changed before the result has been waited for."""
    x = x.contiguous().cpu() if _sends_by_host(axis) else x.contiguous()
    axis.traffic.count("send", x)
    announcement = announce(described(x), axis, to)
    with Watching(axis.watch):
        work = dist.isend(x, axis.ranks[to], axis.group)
    return Pending(x, work if announcement is None else Works([announcement, work]), watch=axis.watch)


def start_receive(shape: tuple[int, ...], like: Tensor, axis: Axis, source: int) -> Pending:
    """Start to receive a tensor from the rank at coordinate `source`.

    It has this shape, and the dtype and device of `like`.
    """
    device = torch.device("cpu") if _sends_by_host(axis) else like.device
    buffer = torch.empty(shape, dtype=like.dtype, device=device)
    expect(described(buffer), axis, source)
    with Watching(axis.watch):
        work = dist.irecv(buffer, axis.ranks[source], axis.group)
    return Pending(buffer, work, lambda x: x.to(like.device), axis.watch)


def _sends_by_host(axis: Axis) -> bool:
    return axis.group is not None and "nccl" not in dist.get_backend(axis.group)
