"""Process groups of torch.distributed: the default one, of all ranks, and those that a mesh makes for its axes."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist

ProcessGroup: TypeAlias = dist.ProcessGroup


def join_world(backend: str, rank: int, world_size: int, *, device: torch.device, timeout_minutes: float = 30) -> None:
    """Make the default process group, unless there is one already; every rank calls this.

    The ranks meet at the address that torchrun left in the environment. Under nccl, tensors on the host (checkpoints,
    exports) are still sent by gloo.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if backend == "nccl" else None,
    )


def leave() -> None:
    """Destroy all process groups of this process, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_group() -> ProcessGroup:
    """Return the default process group, which `join_world` or the user has made."""
    group = dist.group.WORLD
    assert group is not None
    return group


def world_size() -> int:
    """Return the number of ranks in the default process group."""
    return dist.get_world_size()


def new_group(ranks: Sequence[int], backend: str | None = None) -> ProcessGroup:
    """Make a process group of these ranks; every rank of the world calls this, in the same order for all groups."""
    group: ProcessGroup = dist.new_group(list(ranks), backend=backend)
    return group


def destroy_group(group: ProcessGroup) -> None:
    """Destroy a group that `new_group` made; each of its ranks calls this, with none of its messages in flight."""
    dist.destroy_process_group(group)
