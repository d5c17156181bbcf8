"""The master weights of a chunk, on the tier of its optimizer states."""

from torch import Tensor

from parallel.chunk.memory import ChunkMemory
from parallel.storage.transfer import Tier


class States:
    """The master weights [n_shard], fp32 at least: what the optimizer updates. Moments belong to the optimizer, which
    keeps them on the same tier.

    On a disk they are a mapped file, which may be read and written after `ChunkMemory.settle` has returned.
    """

    def __init__(self, master: Tensor, memory: ChunkMemory) -> None:
        self.master, self.tier, self.memory = master, Tier.DEVICE, memory

    def share(self, own: Tensor, tier: Tier) -> None:
        """Let this rank's slice of the parameters, of the same values and on `tier`, be the master weights."""
        self.master, self.tier = own, tier

    def move_apart(self, tier: Tier, *, is_apart: bool) -> None:
        """Give the master weights memory of their own on a tier. `is_apart`: they have memory of their own already."""
        if not is_apart or tier is not self.tier:
            self.master = self.memory.copy(self.master, tier)
        self.tier = tier
