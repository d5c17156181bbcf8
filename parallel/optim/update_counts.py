"""How many updates each parameter has had."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec
from parallel.layout.layout import ParameterInfo


@dataclass(frozen=True)
class Run:
    """Elements `start` … `stop` of a whole chunk, neighbours that have had as many updates, with this one."""

    start: int
    stop: int
    updates: int


class UpdateCounts:
    """Counts updates, and those that a parameter missed because no gradient arrived: Adam's bias correction depends on
    how many the parameter has had.
    """

    def __init__(self) -> None:
        self.total = 0
        self._unused: Container[nn.Parameter] = ()  # parameters without a gradient in this update
        self._missed: dict[ParameterInfo, int] = {}  # of those that missed any

    def begin(self, chunks: Sequence[Chunk], unused: Container[nn.Parameter]) -> None:
        """Count an update in which the parameters in `unused` have no part."""
        self.total += 1
        self._unused = unused
        infos = (info for chunk in chunks for info in chunk.infos if info.parameter in unused)
        self._missed |= {info: self._missed.get(info, 0) + 1 for info in infos}

    def runs(self, spec: ChunkSpec) -> list[Run]:
        """Return what of a chunk has a part in this update."""
        runs: list[Run] = []
        for info, (start, stop) in zip(spec.infos, spec.ranges, strict=True):
            if info.parameter in self._unused:
                continue
            updates = self.total - self._missed.get(info, 0)
            if runs and (runs[-1].stop, runs[-1].updates) == (start, updates):
                start = runs.pop().start
            runs.append(Run(start, stop, updates))
        return runs

    def of_those_that_missed_some(self) -> dict[str, int]:
        """Return by name the updates of each parameter that has had fewer than `total`."""
        return {info.name: self.total - missed for info, missed in self._missed.items()}

    def restore(self, total: int, chunks: Sequence[Chunk], steps: Mapping[str, float]) -> None:
        """Go on after `total` updates; `steps` has those of the parameters that have had fewer."""
        self.total = total
        had = [(info, int(steps.get(info.name, total))) for chunk in chunks for info in chunk.infos]
        self._missed = {info: total - count for info, count in had if count < total}
