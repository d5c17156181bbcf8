"""The master weights of a chunk, on the tier of its optimizer states."""

from torch import Tensor

from parallel.chunk.memory import ChunkMemory
from parallel.storage.transfer import Tier


class States:
    """master [n_shard]: what the optimizer updates, fp32 at least. Moments are the optimizer's, on the same tier.

    On a disk it is a mapped file, to be read and written when `ChunkMemory.settle` has returned.
    """

    def __init__(self, master: Tensor, memory: ChunkMemory) -> None:
        self.master, self.tier, self.memory = master, Tier.DEVICE, memory

    def share(self, own: Tensor, tier: Tier) -> None:
        """Let this rank's slice of the parameters, of the same values and on `tier`, be the master weights."""
        self.master, self.tier = own, tier

    def move_apart(self, tier: Tier, *, is_apart: bool) -> None:
        """Give the master weights memory of their own on a tier. `is_apart`: they have some already."""
        if not is_apart or tier is not self.tier:
            self.master = self.memory.copy(self.master, tier)
        self.tier = tier
