"""The memory of a chunk: allocation on the device, on the host and on a disk, and the copies between them."""

import torch
from torch import Tensor

from parallel.storage.disk import Disk
from parallel.storage.transfer import Tier, copies_of, host_empty


class ChunkMemory:
    """Allocates the tensors of a chunk on each tier. `name` names the chunk in messages about its files on the disk."""

    def __init__(self, device: torch.device, name: str, *, disk: Disk | None = None) -> None:
        self.device, self.name, self.disk = device, name, disk
        self.copies = copies_of(device)

    def empty(self, tier: Tier, like: Tensor, kind: str = "state") -> Tensor:
        """Return an uninitialized flat tensor of the size and dtype of `like`; on the disk it is zero. `kind` says in
        messages what it is.

        Raises RoomError where the disk has no room for it, MemoryError where the host has none.
        """
        if tier is Tier.DISK:
            assert self.disk is not None
            return self.disk.empty(like.numel(), like.dtype, f"{self.name}.{kind}")
        if tier is Tier.HOST:
            return host_empty(like.numel(), like.dtype, self.device)
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    def copy(self, x: Tensor, tier: Tier) -> Tensor:
        """Return a copy of x on a tier. Copies between host and device are complete when this returns."""
        return self.empty(tier, x, "master_weights").copy_(x)

    def settle(self) -> None:
        """Wait for all copies and for the disk: after that, tensors on the host and on the disk may be used."""
        self.copies.synchronize()
        if self.disk is not None:
            self.disk.settle()
