"""A part of a chunk: the unit of an update."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.storage.disk import Disk
from parallel.storage.transfer import CopyEvent, Tier


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a chunk.

    states    master weights and both moments
    gradient  on the device or the host, as it was stored
    own       this rank's slice of the parameters; None where that is the memory of the master weights
    first     the index of the first element in the whole chunk
    updates   the number of updates that the elements have had, with this one
    """

    chunk: Chunk
    states: tuple[Tensor, Tensor, Tensor]
    _: KW_ONLY
    gradient: Tensor
    own: Tensor | None
    first: int
    updates: int

    def cut(self, start: int, stop: int) -> "Part":
        """Return the elements from `start` to `stop`: views."""
        first, second, third = (x[start:stop] for x in self.states)
        own = None if self.own is None else self.own[start:stop]
        gradient, states = self.gradient[start:stop], (first, second, third)
        return replace(self, states=states, gradient=gradient, own=own, first=self.first + start)

    @property
    def is_on_disk(self) -> bool:
        """True if the states are on a disk."""
        return self.chunk.placement.states is Tier.DISK

    @property
    def own_is_on_device(self) -> bool:
        """True if the parameters are on the device, where an update may write them."""
        return self.chunk.placement.parameters is Tier.DEVICE

    @property
    def disk(self) -> Disk:
        """The disk that the states are on."""
        disk = self.chunk.memory.disk
        assert disk is not None
        return disk

    @property
    def gradient_written(self) -> CopyEvent:
        """The copy of the gradient to the host, if it is there."""
        return self.chunk.gradient.written

    def split(self, size: int) -> "Iterator[Part]":
        """Yield the same elements in parts of `size` elements; the last may be smaller."""
        for k in range(0, len(self.gradient), size):
            yield self.cut(k, k + size)
