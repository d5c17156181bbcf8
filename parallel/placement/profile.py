"""A profiled step: the memory that the device holds besides chunks, and how long the step computes and waits.

PatrickStar and Colossal-AI's Gemini have such a warm-up step, with a runtime memory tracer.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from parallel.chunk.chunk import Chunk
from parallel.ops.clock import clock_of
from parallel.placement.policy import MemorySample


class MemoryProfile:
    """The memory samples of a step in which all chunks are offloaded, from the use of one layer to that of the next.

    On a CPU, where a second host pool acts as the device, only chunks are counted.
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks, self.device = list(chunks), device
        self.samples: list[MemorySample] = []
        self._complete: frozenset[int] = frozenset()
        self._whole = self._present()
        self._peak()

    def use(self, unit: str, *, backward: bool) -> None:
        """End a sample: a layer is about to compute. In a backward the gradients of all later layers are complete."""
        whole = self._whole | self._present()
        present = sum(self.chunks[i].spec.whole_bytes for i in whole)
        self.samples.append(MemorySample(max(0, self._peak() - present), whole, self._complete))
        if backward:
            own = [
                i for i, chunk in enumerate(self.chunks) if chunk.infos[0].unit == unit
            ]  # none: it has no parameters
            self._complete |= frozenset(range(own[0] + 1, len(self.chunks))) if own else frozenset()
        self._whole = self._present()

    def end(self) -> list[MemorySample]:
        """Return the samples of the whole step. At its end all gradients are complete."""
        self.use("", backward=False)
        everything = frozenset(range(len(self.chunks)))
        return [*self.samples, MemorySample(self.samples[-1].working, self._present(), everything)]

    def _present(self) -> frozenset[int]:
        """Return the chunks whose parameters are whole now."""
        return frozenset(i for i, c in enumerate(self.chunks) if c.parameters.is_whole)

    def _peak(self) -> int:
        """Return the most bytes that the device held since the last call."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class TimeProfile:
    """The times of a step on the device's clock. They may be read once the device has done all its work."""

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_of(device)
        self._waits: list[tuple[str, Any, Any]] = []  # a layer, and when the wait for its parameters began and ended
        self._begun = self._computed = self._clock.now()

    @contextmanager
    def waiting(self, unit: str) -> Iterator[None]:
        """Time a block in which computation waits for the parameters of a layer."""
        begun = self._clock.now()
        yield
        self._waits.append((unit, begun, self._clock.now()))

    def end_computation(self) -> None:
        """Mark the end of the computation: the device has been given all its work before the update."""
        self._computed = self._clock.now()

    def seconds_waiting(self, units: Container[str]) -> float:
        """Return for how long computation waited for the parameters of these layers."""
        return sum(self._clock.seconds(begun, ended) for unit, begun, ended in self._waits if unit in units)

    def seconds_computing(self) -> float:
        """Return how long the computation before the update took.

        The copies of gradients to the host may have taken longer: they are not part of it.
        """
        return self._clock.seconds(self._begun, self._computed)


class StepProfile:
    """The memory and the times of one step."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.memory = MemoryProfile(chunks, device)
        self.times = TimeProfile(device)

    @contextmanager
    def using(self, unit: str, *, backward: bool) -> Iterator[None]:
        """Profile a block that makes the parameters of a layer whole, before it computes."""
        with self.times.waiting(unit):
            yield
        self.memory.use(unit, backward=backward)
