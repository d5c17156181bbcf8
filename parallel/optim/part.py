"""A part of a chunk, as an update takes it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.storage.disk import Disk
from parallel.storage.transfer import CopyEvent, Tier


@dataclass(frozen=True)
class Part:
    """Some elements of a chunk's masters and moments, of its gradient, and of parameters where they are narrower.

    `first`: where they begin in the whole chunk; `updates`: how many they have had, with this one.
    """

    chunk: Chunk
    states: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor
    own: Tensor | None
    first: int
    updates: int

    def cut(self, start: int, stop: int) -> "Part":
        """Its elements from `start` to `stop`."""
        first, second, third = (x[start:stop] for x in self.states)
        own = None if self.own is None else self.own[start:stop]
        states, gradient = (first, second, third), self.gradient[start:stop]
        return Part(self.chunk, states, gradient, own, self.first + start, self.updates)

    @property
    def is_on_disk(self) -> bool:
        return self.chunk.placement.states is Tier.DISK

    @property
    def disk(self) -> Disk:
        disk = self.chunk.memory.disk
        assert disk is not None
        return disk

    @property
    def arrived(self) -> CopyEvent:
        """The copy of its gradient to the host, where it is there."""
        return self.chunk.gradient.written

    def split(self, size: int) -> "Iterator[Part]":
        """The same in smaller parts, of `size` elements."""
        for k in range(0, len(self.gradient), size):
            yield self.cut(k, k + size)
