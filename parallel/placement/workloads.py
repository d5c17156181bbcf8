"""The workloads that were profiled, and whether the running step asks for more than any of them."""

from collections.abc import Iterable, Sequence
from operator import le
from typing import TypeAlias

from parallel.placement.policy import MemorySample

StepSize: TypeAlias = tuple[int, ...]
"""The size of a step: numbers that each need more memory as they grow, such as samples and sequence length."""


class WorkloadHistory:
    """The sizes and the layers of the steps that a plan is made for, and the memory samples of those profiled here.

    A step is covered if each of its numbers is at most that of one earlier step, and if it uses no layer that none of
    the profiled steps used.
    """

    def __init__(self) -> None:
        self.sizes: list[StepSize] = []
        self.samples: list[MemorySample] = []
        self._layers: set[str] = set()
        self._layers_of_step: set[str] = set()
        self._has_grown = False  # the step became larger after it had begun

    def covers(self, size: StepSize) -> bool:
        """Return whether a step of this size needs no more memory than one of those before."""
        return any(len(size) == len(seen) and all(map(le, size, seen)) for seen in self.sizes)

    def add(self, size: StepSize) -> None:
        self.sizes.append(size)

    def begin_step(self) -> None:
        self._layers_of_step.clear()
        self._has_grown = False

    def note_growth(self) -> None:
        """The running step is larger than its size was said to be when it began."""
        self._has_grown = True

    def note_layer(self, layer: str) -> None:
        """The running step uses this layer."""
        self._layers_of_step.add(layer)

    def is_outgrown(self) -> bool:
        """Return whether the running step grew, or used a layer that no profiled step used."""
        return self._has_grown or not self._layers_of_step <= self._layers

    def add_profile(self, samples: Iterable[MemorySample]) -> None:
        """Add what was measured of the running step: its layers are covered from now on."""
        self.samples += samples
        self._layers |= self._layers_of_step

    def restore(self, sizes: Sequence[StepSize], layers: Iterable[str]) -> None:
        """Continue from the sizes that a saved plan was made for, and with all layers covered."""
        self.sizes = list(sizes)
        self._layers = set(layers)

    def drop_unmeasured(self) -> None:
        """Drop all sizes but the newest if no step was profiled here: their memory is known only to the process that
        saved the plan. So when they come again, they are profiled.
        """
        if not self.samples:
            del self.sizes[:-1]
