"""Point-to-point messages between the ranks of a pipe.

Activations are sent from rank to rank in one direction and gradients in the other, or, after the turn of a V, the other
way around. A rank receives and sends, in each direction, in process groups of their own, so that none of these waits
behind another. Within a group, messages between two ranks match in the order in which each end posts them. gloo sends
no CUDA tensors from rank to rank: these are copied to the host and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh.collectives import Pending, Watching, Works, announce, expect
from parallel.mesh.comparison import described
from parallel.mesh.mesh import Axis
from parallel.mesh.topology import Link


@dataclass(frozen=True)
class Pipe:
    """The pipe `axis`, and its `links`: the same axis for each pair of neighbours, in the process group of their link.

    NCCL executes the calls of a group in order: in a shared group a receive would delay what has to be sent.
    """

    axis: Axis
    links: Mapping[Link, Axis]

    @property
    def rank(self) -> int:
        """This rank's coordinate along the pipe."""
        return self.axis.rank

    @property
    def size(self) -> int:
        """The number of ranks along the pipe."""
        return self.axis.size

    def link(self, source: int, to: int) -> Axis:
        """Return the axis for messages from rank `source` of the pipe to its neighbour `to`."""
        return self.links[source, to]

    def connect(self, device: torch.device) -> None:
        """Send a number over each link. Every rank calls this before a plan runs.

        NCCL connects two ranks at their first message, and blocks the host until both have called: in a plan that might
        be for a message that this rank has yet to post. All ranks take the links in one order, so none waits forever.
        """
        for (source, to), axis in sorted(self.links.items(), key=lambda item: item[0]):
            if self.rank not in (source, to):
                continue
            number = torch.zeros(1, device="cpu" if _sends_by_host(axis) else device)
            with Watching(axis.watch):
                if self.rank == source:
                    dist.send(number, axis.ranks[to], axis.group)
                else:
                    dist.recv(number, axis.ranks[source], axis.group)


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
