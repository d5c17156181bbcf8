"""Adam's moments, on the tier of the master weights to which they belong."""

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.chunk.precision import moment_dtype
from parallel.config import OptimizerConfig
from parallel.storage.transfer import Tier


class Moments:
    """The first and the second moment of each chunk, [n_shard] each, from the chunk's first update on."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self._found: dict[Chunk, tuple[Tensor, Tensor]] = {}

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return both moments of a chunk. The first call makes them, with the value zero."""
        if chunk not in self._found:
            tier, dtype = chunk.placement.states, moment_dtype(chunk.master.dtype, self.config)
            like = torch.empty_like(chunk.master, dtype=dtype, device="meta")
            first, second = (chunk.memory.empty(tier, like, "moments") for _ in range(2))
            for x in (first, second) if tier is not Tier.DISK else ():  # a new file is zero
                x.zero_()
            self._found[chunk] = first, second
        return self._found[chunk]

    def move(self, chunk: Chunk) -> None:
        """Move the moments of a chunk, if it has any, to the tier of its master weights."""
        if chunk in self._found:
            tier = chunk.placement.states
            first, second = (chunk.memory.empty(tier, x, "moments").copy_(x) for x in self._found[chunk])
            self._found[chunk] = first, second

    def held(self) -> list[tuple[Tier, Tensor]]:
        """Return all moments, and the tier of each."""
        return [(chunk.placement.states, x) for chunk, moments in self._found.items() for x in moments]
