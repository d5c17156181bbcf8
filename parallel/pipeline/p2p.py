"""Point-to-point messages between pipeline stages."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Axis


def exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[tuple[int, ...], int]], pipe: Axis, like: Tensor
) -> list[Tensor]:
    """Post all sends (tensor, coordinate on the pipe) and receives (shape, coordinate) at once; return what arrives.

    Messages between two ranks match in the order in which each posts them. `like` gives the dtype and device of what
    arrives. gloo carries no CUDA tensors from rank to rank: there they go through the host.
    """
    by_host = "nccl" not in dist.get_backend(pipe.group)
    outgoing = [(x.contiguous().cpu() if by_host else x.contiguous(), peer) for x, peer in sends]
    device = torch.device("cpu") if by_host else like.device
    incoming = [(torch.empty(shape, dtype=like.dtype, device=device), peer) for shape, peer in receives]
    for x, _ in outgoing:
        pipe.traffic.count("send", x)
    operations = [dist.P2POp(dist.isend, x, pipe.ranks[peer], pipe.group) for x, peer in outgoing]
    operations += [dist.P2POp(dist.irecv, x, pipe.ranks[peer], pipe.group) for x, peer in incoming]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [x.to(like.device) for x, _ in incoming]
