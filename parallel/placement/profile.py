"""A step looked on at: what the device holds besides chunks, from one layer's use to the next."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from parallel.chunk.chunk import Chunk
from parallel.ops.clock import clock_of
from parallel.placement.policy import ChunkBytes, MemorySample


class StepProfile:
    """Told of each layer as it is used, while all chunks are at home on the host.

    On a CPU, where a second host pool stands for the device, nothing but chunks is counted.
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks, self.device = list(chunks), device
        self.moments: list[MemorySample] = []
        self._complete: frozenset[int] = frozenset()
        self._whole = self._present()
        self._clock = clock_of(device)
        self._waits: list[tuple[str, Any, Any]] = []
        self._begun = self._computed = self._clock.now()
        self._peak()

    def used(self, unit: str, *, backward: bool) -> None:
        """A layer is about to be: what has been since the last one makes a moment."""
        whole = self._whole | self._present()
        present = sum(self.chunks[i].spec.whole_bytes for i in whole)
        self.moments.append(MemorySample(max(0, self._peak() - present), whole, self._complete))
        if backward:
            first = next(i for i, chunk in enumerate(self.chunks) if chunk.infos[0].unit == unit)
            self._complete |= frozenset(range(first + 1, len(self.chunks)))
        self._whole = self._present()

    @contextmanager
    def waiting(self, unit: str) -> Iterator[None]:
        """Around the wait for a layer's parameters."""
        begun = self._clock.now()
        yield
        self._waits.append((unit, begun, self._clock.now()))

    def waited(self, units: Container[str]) -> float:
        """The seconds that computation stood still for the parameters of these, all of it being done by now."""
        return sum(self._clock.seconds(begun, ended) for unit, begun, ended in self._waits if unit in units)

    def computed(self) -> None:
        """Called when the device has been given all that comes before the update."""
        self._computed = self._clock.now()

    def computing(self) -> float:
        """The seconds until then by the device's computation: gradients may still have been on their way down. All of
        it being done by now.
        """
        return self._clock.seconds(self._begun, self._computed)

    def end(self) -> list[MemorySample]:
        """Of the whole step; all gradients are complete."""
        self.used("", backward=False)
        everything = frozenset(range(len(self.chunks)))
        return [*self.moments, MemorySample(self.moments[-1].working, self._present(), everything)]

    def sizes(self, foreseen: Sequence[ChunkBytes], state_bytes: Callable[[Chunk], int]) -> list[ChunkBytes]:
        """With the gradients that were seen: a user's own loop has its own microbatches; and a user's optimizer its own
        states.
        """
        return [
            replace(size, gradient=chunk.gradient.num_bytes, states=state_bytes(chunk))
            for size, chunk in zip(foreseen, self.chunks, strict=True)
        ]

    def _present(self) -> frozenset[int]:
        return frozenset(i for i, c in enumerate(self.chunks) if c.parameters.is_whole)

    def _peak(self) -> int:
        """The most bytes since it was asked for last."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak
